//! Zip archives: each entry is a range of the file.
//!
//! The directory at the end is the truth: names, sizes and places are its own, also where an entry's own
//! header leaves its sizes to a descriptor behind it. Nothing is ever unpacked: an entry that is
//! compressed or encrypted says so.
//!
//! Source: PKWARE's APPNOTE, 4.3 and 4.5 (zip64).

use std::collections::BTreeSet;
use std::ops::Range;

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry<'a> {
    /// Its name, with the folders that it lies in.
    pub name: &'a str,
    /// Its bytes within the file.
    pub range: Range<usize>,
    /// Why they are not what was put in, if they are not.
    pub packed: Option<String>,
}

const END: &[u8] = b"PK\x05\x06";
const END_64: &[u8] = b"PK\x06\x06";
const LOCATOR_64: &[u8] = b"PK\x06\x07";
const CENTRAL: &[u8] = b"PK\x01\x02";
const LOCAL: &[u8] = b"PK\x03\x04";
/// What stands where 16 or 32 bits are too few, and zip64 has the number.
const FULL_16: u64 = 0xffff;
const FULL_32: u64 = 0xffff_ffff;

type Read<T> = Result<T, String>;

/// The entries of an archive, in the order of its directory. They lie within the file, before the
/// directory, and do not overlap; no two have one name.
pub(crate) fn read(file: &[u8]) -> Read<Vec<Entry<'_>>> {
    let directory = directory(file)?;
    let mut rest = &file[directory.range.clone()];
    let mut entries = Vec::new();
    let mut names = BTreeSet::new();
    for _ in 0..directory.entries {
        let entry = central(file, &mut rest, directory.range.start)?;
        if !names.insert(entry.name) {
            return Err(format!("the entry {:?} is there twice", entry.name));
        }
        entries.push(entry);
    }
    let mut sorted: Vec<_> = entries.iter().collect();
    sorted.sort_by_key(|e| (e.range.start, e.range.end));
    for pair in sorted.windows(2) {
        if pair[1].range.start < pair[0].range.end {
            return Err(format!(
                "the entries {:?} and {:?} overlap",
                pair[0].name, pair[1].name
            ));
        }
    }
    Ok(entries)
}

struct Directory {
    range: Range<usize>,
    entries: u64,
}

/// A little-endian number of up to 8 bytes at a place.
fn number(bytes: &[u8], at: usize, width: usize) -> Read<u64> {
    let end = at.checked_add(width);
    let found = end.and_then(|end| bytes.get(at..end));
    let found = found.ok_or("it ends in the middle of a record")?;
    Ok(found.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)))
}

fn place(n: u64) -> usize {
    // What lies beyond the address space lies beyond the file, too.
    usize::try_from(n).unwrap_or(usize::MAX)
}

fn directory(file: &[u8]) -> Read<Directory> {
    const SIZE: usize = 22;
    let is_end = |at: &usize| {
        let comment = number(file, at + 20, 2).map(place);
        file[*at..].starts_with(END) && comment.is_ok_and(|c| at + SIZE + c == file.len())
    };
    let last = file.len().checked_sub(SIZE);
    let first = last.unwrap_or(0).saturating_sub(FULL_16 as usize);
    let end = last
        .and_then(|last| (first..=last).rev().find(is_end))
        .ok_or("the directory at its end is missing: only a part of the file is here")?;
    let [disk, start_disk, here, entries] =
        [4, 6, 8, 10].map(|at| number(file, end + at, 2).unwrap_or(FULL_16));
    let (mut size, mut start) = (number(file, end + 12, 4)?, number(file, end + 16, 4)?);
    let (mut entries, mut limit) = (entries, end);
    let full = [here, entries].contains(&FULL_16) || [size, start].contains(&FULL_32);
    if full {
        let locator = end
            .checked_sub(20)
            .filter(|at| file[*at..].starts_with(LOCATOR_64));
        if let Some(locator) = locator {
            let at = place(number(file, locator + 8, 8)?);
            if !file.get(at..).is_some_and(|b| b.starts_with(END_64)) || at > locator {
                return Err(format!("the zip64 directory's end is not at byte {at}"));
            }
            entries = number(file, at + 32, 8)?;
            size = number(file, at + 40, 8)?;
            start = number(file, at + 48, 8)?;
            limit = at;
        }
    } else if disk != 0 || start_disk != 0 || here != entries {
        return Err("it is one of several parts of an archive".into());
    }
    let (from, to) = (place(start), place(start.saturating_add(size)));
    if from > to || to > limit {
        return Err(format!(
            "the directory should be bytes {from} to {to}, but must end before byte {limit}"
        ));
    }
    Ok(Directory {
        range: from..to,
        entries,
    })
}

/// The next entry of the directory, which begins at `limit`.
fn central<'a>(file: &'a [u8], rest: &mut &'a [u8], limit: usize) -> Read<Entry<'a>> {
    const SIZE: usize = 46;
    let record = *rest;
    if !record.starts_with(CENTRAL) || record.len() < SIZE {
        return Err("the directory has fewer entries than it says".into());
    }
    let [flags, method, name, extra, comment] =
        [8, 10, 28, 30, 32].map(|at| number(record, at, 2).map_or(0, place));
    let all = SIZE + name + extra + comment;
    if record.len() < all {
        return Err("the directory ends in the middle of an entry".into());
    }
    let name = std::str::from_utf8(&record[SIZE..][..name])
        .map_err(|_| "the name of an entry is not UTF-8")?;
    let shown: String = name.chars().take(80).collect();
    let fault = |why: String| format!("the entry {shown:?} {why}");
    let extra = &record[SIZE + name.len()..][..extra];
    let [mut packed, mut size] = [number(record, 20, 4)?, number(record, 24, 4)?];
    let mut at = number(record, 42, 4)?;
    if [packed, size, at].contains(&FULL_32) {
        let mut wide = zip64(extra).unwrap_or_default();
        for field in [&mut size, &mut packed, &mut at] {
            if *field == FULL_32 {
                *field = number(wide, 0, 8).map_err(|_| fault("lacks its zip64 sizes".into()))?;
                wide = &wide[8..];
            }
        }
    }
    *rest = &record[all..];
    let refused = if method != 0 {
        Some(format!(
            "is compressed (method {method}); PyTorch stores entries as they are. Load the file and save it again with torch.save"
        ))
    } else if flags & 1 != 0 {
        Some("is encrypted".into())
    } else if packed != size {
        return Err(fault(format!("takes {packed} bytes for {size}")));
    } else {
        None
    };
    // The entry's own header: only its length counts.
    let at = place(at);
    if at >= limit || !file[at..].starts_with(LOCAL) {
        return Err(fault(format!("should begin at byte {at}, but does not")));
    }
    let (n, m) = (number(file, at + 26, 2)?, number(file, at + 28, 2)?);
    let start = at + 30 + place(n) + place(m);
    let end = start.saturating_add(place(packed));
    if end > limit {
        return Err(fault(format!(
            "should be bytes {start} to {end}, but the directory begins at byte {limit}"
        )));
    }
    if file.get(at + 30..at + 30 + place(n)) != Some(name.as_bytes()) {
        return Err(fault(format!("has another name at byte {at}")));
    }
    Ok(Entry {
        name,
        range: start..end,
        packed: refused.map(fault),
    })
}

/// The zip64 field of an entry's extra fields.
fn zip64(mut extra: &[u8]) -> Option<&[u8]> {
    loop {
        let (id, length) = (number(extra, 0, 2).ok()?, place(number(extra, 2, 2).ok()?));
        let field = extra.get(4..4 + length)?;
        if id == 1 {
            return Some(field);
        }
        extra = &extra[4 + length..];
    }
}
