//! Files are whole or not there, and a conversion that was stopped goes on where it was.

use std::path::Path;

use strata_converters::checkpoint::Contents;
use strata_converters::write::{self, Content, File, Progress, Quiet, Target, safetensors};
use strata_kernels::{Format, HostTensor};

use crate::common::Folder;

/// Stops after some bytes.
struct Stop {
    after: u64,
    told: u64,
}

impl Progress for Stop {
    fn advance(&mut self, bytes: u64) {
        self.told += bytes;
    }

    fn stopped(&self) -> bool {
        self.told >= self.after
    }
}

/// Tensors of many pieces: bytes as they are, and elements that are rounded on the way.
fn targets() -> Vec<Target> {
    let values: Vec<f32> = (0..3_000_000).map(|i| (i % 1001) as f32).collect();
    let tensor = HostTensor::from_f32(&[3000, 1000], &values).unwrap();
    let bytes: Vec<u8> = (0..9_000_000).map(|i| (i % 253) as u8).collect();
    vec![
        Target::stored("bytes", vec![bytes.len()], "U8", bytes.len() as u64, {
            move || Ok(Contents::owned(bytes.clone()))
        }),
        Target::made("halves", vec![3000, 1000], Format::BF16, move || {
            let (a, b) = (1_000_000..3_000_000, 0..1_000_000);
            Ok(Content::Made {
                runs: vec![(tensor.clone(), a).into(), (tensor.clone(), b).into()],
                undo: Vec::new(),
            })
        }),
    ]
}

fn file<'a>(path: &'a Path, header: &'a [u8], targets: &'a [&'a Target]) -> File<'a> {
    File {
        path,
        header,
        targets,
        align: 1,
    }
}

#[test]
fn what_was_stopped_goes_on_and_ends_the_same() {
    let (folder, targets) = (Folder::new(), targets());
    let all: Vec<&Target> = targets.iter().collect();
    let header = safetensors::header(&all).unwrap();
    let path = |name: &str| folder.path().join(name);
    let whole = path("whole");
    write::write(&file(&whole, &header, &all), 1, 3, &mut Quiet).unwrap();
    let expected = std::fs::read(&whole).unwrap();

    for threads in [1, 4] {
        let name = path(&format!("stopped-{threads}"));
        let mut runs = 0;
        for after in [1, 5_000_000, 11_000_000] {
            let mut stop = Stop { after, told: 0 };
            let error =
                write::write(&file(&name, &header, &all), 1, threads, &mut stop).unwrap_err();
            assert!(error.to_string().contains("goes on"), "{error}");
            assert!(!name.exists());
            let left = std::fs::metadata(path(&format!("stopped-{threads}.partial")));
            assert_eq!(write::begun(&name), left.unwrap().len());
            runs += 1;
        }
        let mut rest = Stop {
            after: u64::MAX,
            told: 0,
        };
        write::write(&file(&name, &header, &all), 1, threads, &mut rest).unwrap();
        assert_eq!(
            rest.told,
            expected.len() as u64,
            "all that is there is told"
        );
        assert_eq!(
            std::fs::read(&name).unwrap(),
            expected,
            "after {runs} stops"
        );
        assert!(!path(&format!("stopped-{threads}.note")).exists());
        assert_eq!(write::begun(&name), 0);
        // Of a folder, what its files take.
        std::fs::create_dir(path("half.partial")).unwrap_or_default();
        folder.write("half.partial/a", b"12345");
        folder.write("half.partial/b", b"678");
        assert_eq!(write::begun(&path("half")), 8);
    }

    // Half of another conversion is worth nothing.
    let name = path("other");
    let mut stop = Stop {
        after: 5_000_000,
        told: 0,
    };
    write::write(&file(&name, &header, &all), 1, 2, &mut stop).unwrap_err();
    write::write(&file(&name, &header, &all), 2, 2, &mut Quiet).unwrap();
    assert_eq!(std::fs::read(&name).unwrap(), expected);
}

#[test]
fn a_note_that_lies_is_not_believed() {
    let (folder, targets) = (Folder::new(), targets());
    let all: Vec<&Target> = targets.iter().collect();
    let header = safetensors::header(&all).unwrap();
    let path = folder.path().join("file");
    for note in [
        "",
        "x",
        "1 1",
        "0000000000000001 99999 12",
        "0000000000000001 2 99999999999",
    ] {
        folder.write("file.note", note.as_bytes());
        folder.write("file.partial", b"short");
        let file = File {
            path: &path,
            header: &header,
            targets: &all,
            align: 1,
        };
        write::write(&file, 1, 2, &mut Quiet).unwrap();
        let found = std::fs::read(&path).unwrap();
        assert_eq!(
            found.len() as u64,
            header.len() as u64 + 9_000_000 + 6_000_000,
            "{note:?}"
        );
        assert_eq!(found[..header.len()], header);
    }
}

#[test]
fn a_place_that_cannot_be_written_is_named() {
    let (folder, targets) = (Folder::new(), targets());
    let all: Vec<&Target> = targets.iter().collect();
    let path = folder.path().join("no/such/folder/file");
    let file = File {
        path: &path,
        header: b"",
        targets: &all,
        align: 1,
    };
    let error = write::write(&file, 1, 2, &mut Quiet)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("no/such/folder") && error.contains("cannot be written"),
        "{error}"
    );
}
