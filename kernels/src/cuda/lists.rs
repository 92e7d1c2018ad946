//! Lists that operations bring along in host memory (token ids, rows, spans, page tables), on their way
//! to the device through a ring of pinned memory. What describes a batch is sent once for all
//! operations of a step.

use std::sync::Arc;

use cudarc::driver::result;
use cudarc::driver::sys::{CUevent, CUevent_flags_enum};

use super::device::{Allocation, Device, Pinned, failed};
use super::fault;
use crate::backend::Repeat;
use crate::error::Result;
use crate::span::{Ragged, Span};

/// The ring: its parts are written one after the other, each when the device is done with it.
const PARTS: usize = 4;
const PART: usize = 4 << 20;
const ALIGN: usize = 256;

/// A ring of lists, at the same places in host and device memory.
pub(super) struct Lists {
    host: Pinned,
    on_device: Allocation,
    /// Bytes sent so far, those skipped among them: a place in an endless ring.
    sent: usize,
    done: Vec<CUevent>,
    room: Vec<u8>,
    batch: Batch,
    /// Where lists go while operations are recorded.
    fixed: Option<Fixed>,
    device: Arc<Device>,
}

/// Memory of one recording for its lists, those that change from run to run behind those that do not.
pub(super) struct Fixed {
    memory: Allocation,
    /// Bytes of lists that do not change.
    used: usize,
    ids: Vec<u32>,
    batch: Batch,
    at: OnDevice,
}

/// Room for lists that do not change, and what they begin at a multiple of.
const CONSTANTS: usize = 64 << 10;

impl Fixed {
    /// Memory for recording a step of so many sequences with one row each and `pages` pages in all.
    pub fn new(device: &Arc<Device>, step: &Repeat<'_>, pages: usize) -> Result<Self> {
        let rows = step.ids.len();
        let memory = Allocation::new(device, CONSTANTS + 40 * rows + 4 * pages)?;
        let spans = memory.pointer + CONSTANTS as u64;
        let span_of = spans + 32 * rows as u64;
        let at = OnDevice {
            spans,
            span_of,
            table: span_of + 8 * rows as u64,
        };
        let mut batch = Batch::default();
        batch.keep(&step.ragged);
        Ok(Fixed {
            memory,
            used: 0,
            ids: step.ids.to_vec(),
            batch,
            at,
        })
    }

    /// Of each row, its token.
    fn ids(&self) -> u64 {
        self.at.span_of + 4 * self.ids.len() as u64
    }
}

// SAFETY: events may be used from any thread.
unsafe impl Send for Lists {}

/// The batch that was sent last.
#[derive(Default)]
struct Batch {
    spans: Vec<Span>,
    page_table: Vec<u32>,
    page_size: usize,
    start: usize,
    sent: Option<OnDevice>,
    /// Tiles of attention: heads of a group and queries of a tile, where they stand, how many.
    tiles: Vec<([usize; 2], u64, usize)>,
}

impl Batch {
    fn is(&self, ragged: &Ragged<'_>) -> bool {
        self.page_size == ragged.page_size
            && self.spans == ragged.spans
            && self.page_table == ragged.page_table
    }

    fn keep(&mut self, ragged: &Ragged<'_>) {
        self.spans.clear();
        self.spans.extend(ragged.spans.iter().cloned());
        self.page_table.clear();
        self.page_table.extend_from_slice(ragged.page_table);
        self.page_size = ragged.page_size;
        self.tiles.clear();
    }
}

/// Spans, the number of each row's span, page tables.
fn describe(ragged: &Ragged<'_>, room: &mut Vec<u8>) {
    let mut number = |n: usize| room.extend((n as u32).to_ne_bytes());
    for s in ragged.spans {
        [s.start, s.len, s.position, s.slot, s.pages.start, 0, 0, 0]
            .into_iter()
            .for_each(&mut number);
    }
    for (i, s) in ragged.spans.iter().enumerate() {
        (0..s.len).for_each(|_| number(i));
    }
    ragged.page_table.iter().for_each(|p| number(*p as usize));
}

/// Where the description of a batch stands on the device.
#[derive(Debug, Clone, Copy)]
pub(super) struct OnDevice {
    /// Eight numbers a span: see `Span` in common.cuh.
    pub spans: u64,
    /// Of each row, the number of its span.
    pub span_of: u64,
    /// Pages of all sequences.
    pub table: u64,
}

impl Lists {
    pub fn new(device: &Arc<Device>) -> Result<Self> {
        let flag = CUevent_flags_enum::CU_EVENT_DISABLE_TIMING;
        let done: Vec<CUevent> = (0..PARTS)
            .map(|_| result::event::create(flag).map_err(failed("making an event")))
            .collect::<Result<_>>()?;
        Ok(Lists {
            host: Pinned::new(device, PARTS * PART)?,
            on_device: Allocation::new(device, PARTS * PART)?,
            sent: 0,
            done,
            room: Vec::new(),
            batch: Batch::default(),
            fixed: None,
            device: device.clone(),
        })
    }

    /// Sends bytes; they stay where they are put until the ring comes round again, which is later in
    /// the order of the stream than what is launched now.
    pub fn send(&mut self, bytes: &[u8]) -> Result<u64> {
        let Some(fixed) = &mut self.fixed else {
            return self.send_to(bytes, None);
        };
        let at = fixed.used.next_multiple_of(ALIGN);
        if at + bytes.len() > CONSTANTS {
            return Err(fault(format!(
                "a list of {} bytes, to be recorded",
                bytes.len()
            )));
        }
        fixed.used = at + bytes.len();
        let to = fixed.memory.pointer + at as u64;
        self.send_to(bytes, Some(to))
    }

    /// Sends bytes to their place in the ring, or to another.
    fn send_to(&mut self, bytes: &[u8], to: Option<u64>) -> Result<u64> {
        if bytes.len() > PART {
            return Err(fault(format!(
                "a list of {} bytes, at most {PART} can be sent",
                bytes.len()
            )));
        }
        if self.sent % PART + bytes.len() > PART {
            let left = self.sent / PART % PARTS;
            // SAFETY: event and stream are alive.
            unsafe { result::event::record(self.done[left], self.device.stream) }
                .map_err(failed("marking the stream"))?;
            self.sent = self.sent.next_multiple_of(PART);
        }
        if self.sent.is_multiple_of(PART) && self.sent >= PARTS * PART {
            let next = self.sent / PART % PARTS;
            // SAFETY: recorded when this part was left.
            unsafe { result::event::synchronize(self.done[next]) }
                .map_err(failed("the GPU's work"))?;
        }
        let at = self.sent % (PARTS * PART);
        let pointer = to.unwrap_or(self.on_device.pointer + at as u64);
        // SAFETY: the bytes lie within the ring, and the device has read what stood there before.
        unsafe {
            let host = self.host.pointer.add(at);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), host, bytes.len());
            let from = std::slice::from_raw_parts(host, bytes.len());
            result::memcpy_htod_async(pointer, from, self.device.stream)
        }
        .map_err(failed("sending a list"))?;
        // A part that is filled to its end is left at once.
        self.sent += bytes.len().next_multiple_of(ALIGN);
        if self.sent.is_multiple_of(PART) {
            let left = (self.sent / PART - 1) % PARTS;
            // SAFETY: as above.
            unsafe { result::event::record(self.done[left], self.device.stream) }
                .map_err(failed("marking the stream"))?;
        }
        Ok(pointer)
    }

    /// Sends numbers.
    pub fn send_numbers(&mut self, numbers: impl Iterator<Item = u32>) -> Result<u64> {
        let mut room = std::mem::take(&mut self.room);
        room.clear();
        numbers.for_each(|n| room.extend(n.to_ne_bytes()));
        let sent = self.send(&room);
        self.room = room;
        sent
    }

    /// Sends the tokens of a batch's rows.
    pub fn ids(&mut self, ids: &[u32]) -> Result<u64> {
        match &self.fixed {
            Some(fixed) if fixed.ids == ids => Ok(fixed.ids()),
            Some(_) => Err(fault("other tokens than the step's, to be recorded".into())),
            None => self.send_numbers(ids.iter().copied()),
        }
    }

    /// From here on lists go to the memory of a recording.
    pub fn begin_recording(&mut self, fixed: Fixed) {
        self.fixed = Some(fixed);
    }

    /// From here on lists go through the ring again.
    pub fn end_recording(&mut self) -> Option<Fixed> {
        self.fixed.take()
    }

    /// Sends what changes from run to run to the memory of a recording.
    pub fn refill(&mut self, fixed: &Fixed, step: &Repeat<'_>) -> Result<()> {
        let mut room = std::mem::take(&mut self.room);
        room.clear();
        describe(&step.ragged, &mut room);
        let table = room.split_off(36 * step.ids.len());
        step.ids.iter().for_each(|id| room.extend(id.to_ne_bytes()));
        room.extend(table);
        let sent = self.send_to(&room, Some(fixed.at.spans));
        self.room = room;
        sent.map(|_| ())
    }

    /// The description of a batch, sent unless it is the one that was sent last.
    pub fn batch(&mut self, ragged: &Ragged<'_>) -> Result<OnDevice> {
        if let Some(fixed) = &self.fixed {
            if fixed.batch.is(ragged) {
                return Ok(fixed.at);
            }
            return Err(fault(
                "another batch than the step's, to be recorded".into(),
            ));
        }
        let batch = &self.batch;
        let same = batch.is(ragged);
        // One part must be left between here and what will be written next.
        let intact = self.sent + 2 * PART < batch.start + PARTS * PART;
        if let Some(sent) = batch.sent.filter(|_| same && intact) {
            return Ok(sent);
        }
        let mut room = std::mem::take(&mut self.room);
        room.clear();
        describe(ragged, &mut room);
        let base = self.send(&room);
        self.room = room;
        let base = base?;
        let span_of = base + 32 * ragged.spans.len() as u64;
        let sent = OnDevice {
            spans: base,
            span_of,
            table: span_of + 4 * ragged.rows() as u64,
        };
        let batch = &mut self.batch;
        batch.keep(ragged);
        batch.start = (self.sent - 1) / PART * PART;
        batch.sent = Some(sent);
        Ok(sent)
    }

    /// For attention by heads in groups of `group`, in tiles of `queries`: how many tiles lie before
    /// each span, and how many there are. The batch was sent just before.
    pub fn tiles(
        &mut self,
        ragged: &Ragged<'_>,
        group: usize,
        queries: usize,
    ) -> Result<(u64, usize)> {
        let kind = [group, queries];
        let batch = self.fixed.as_ref().map_or(&self.batch, |f| &f.batch);
        let known = batch.tiles.iter().find(|(k, ..)| *k == kind);
        if let Some((_, pointer, count)) = known {
            return Ok((*pointer, *count));
        }
        let mut count = 0;
        let before = |s: &Span| {
            let first = count;
            count += (s.len * group).div_ceil(queries);
            first as u32
        };
        let pointer = self.send_numbers(ragged.spans.iter().map(before))?;
        let batch = self
            .fixed
            .as_mut()
            .map_or(&mut self.batch, |f| &mut f.batch);
        batch.tiles.push((kind, pointer, count));
        Ok((pointer, count))
    }
}

impl Drop for Lists {
    fn drop(&mut self) {
        if self.device.enter().is_ok() {
            let _ = self.device.synchronize();
            for event in &self.done {
                // SAFETY: made in `new`, destroyed once.
                let _ = unsafe { result::event::destroy(*event) };
            }
        }
    }
}
