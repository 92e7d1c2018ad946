//! Lists that operations bring along in host memory (token ids, rows, spans, page tables), on their way
//! to the device through a ring of pinned memory. What describes a batch is sent once for all
//! operations of a step.

use std::sync::Arc;

use cudarc::driver::result;
use cudarc::driver::sys::{CUevent, CUevent_flags_enum};

use super::device::{Allocation, Device, Pinned, failed};
use super::fault;
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
    device: Arc<Device>,
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
            device: device.clone(),
        })
    }

    /// Sends bytes; they stay where they are put until the ring comes round again, which is later in
    /// the order of the stream than what is launched now.
    pub fn send(&mut self, bytes: &[u8]) -> Result<u64> {
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
        let pointer = self.on_device.pointer + at as u64;
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

    /// The description of a batch, sent unless it is the one that was sent last.
    pub fn batch(&mut self, ragged: &Ragged<'_>) -> Result<OnDevice> {
        let batch = &self.batch;
        let same = batch.page_size == ragged.page_size
            && batch.spans == ragged.spans
            && batch.page_table == ragged.page_table;
        // One part must be left between here and what will be written next.
        let intact = self.sent + 2 * PART < batch.start + PARTS * PART;
        if let Some(sent) = batch.sent.filter(|_| same && intact) {
            return Ok(sent);
        }
        let mut room = std::mem::take(&mut self.room);
        room.clear();
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
        batch.spans.clear();
        batch.spans.extend(ragged.spans.iter().cloned());
        batch.page_table.clear();
        batch.page_table.extend_from_slice(ragged.page_table);
        batch.page_size = ragged.page_size;
        batch.start = (self.sent - 1) / PART * PART;
        batch.sent = Some(sent);
        batch.tiles.clear();
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
        let known = self.batch.tiles.iter().find(|(k, ..)| *k == kind);
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
        self.batch.tiles.push((kind, pointer, count));
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
