//! PyTorch files that are not what they should be: damaged, lying, or with code in them.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use strata_converters::{Checkpoint, ModelFiles};

#[allow(dead_code)]
#[path = "fuzz/src/checks.rs"]
mod checks;

/// What comes of a file: the names of its tensors, or why there are none.
fn open(bytes: &[u8], name: &str) -> String {
    let folder = std::env::temp_dir().join(format!("strata-torch-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("m.pt");
    std::fs::write(&path, bytes).unwrap();
    let start = Instant::now();
    let shown = match Checkpoint::open(&ModelFiles::beside(&path).unwrap()) {
        Ok(checkpoint) => {
            let names: Vec<&str> = checkpoint.tensors().map(|(n, _)| n).collect();
            names.iter().for_each(|n| {
                checkpoint.contents(n).unwrap();
            });
            format!("opened: {}", names.join(" "))
        }
        Err(error) => error.to_string(),
    };
    assert!(start.elapsed() < Duration::from_secs(20), "{shown}");
    shown
}

/// A pickle in an archive with a storage of 4 floats under "0".
fn pickled(pickle: &[u8]) -> Vec<u8> {
    checks::archive(&[("m/data.pkl", pickle), ("m/data/0", &[1; 16])])
}

/// A tensor by `_rebuild_tensor_v2`: offset, sizes and strides as opcodes, `count` elements in the storage.
fn tensor(count: &[u8], offset: &[u8], sizes: &[u8], strides: &[u8]) -> Vec<u8> {
    [
        b"\x80\x02}X\x01\0\0\0actorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu",
        count,
        b"tQ",
        offset,
        sizes,
        strides,
        b"\x89}tRs.",
    ]
    .concat()
}

#[test]
fn pickles_with_code_or_lies_say_what_is_wrong() {
    let check = |name: &str, pickle: &[u8], expected: &str| {
        let found = open(&pickled(pickle), name);
        assert!(found.contains(expected), "{name}: {expected}: {found}");
    };
    let good = tensor(b"K\x04", b"K\0", b"K\x02K\x02\x86", b"K\x02K\x01\x86");
    check("good", &good, "opened: a");
    // Code.
    for (name, pickle, called) in [
        (
            "system",
            &b"\x80\x02cos\nsystem\nX\x02\0\0\0ls\x85R."[..],
            "os.system",
        ),
        (
            "eval",
            b"\x80\x02cbuiltins\neval\nX\x01\0\0\x001\x85R.",
            "builtins.eval",
        ),
        (
            "partial",
            b"\x80\x02cfunctools\npartial\ncos\nsystem\n\x85R.",
            "functools.partial",
        ),
        (
            "stack-global",
            b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02ls\x85R.",
            "os.system",
        ),
        ("inst", b"\x80\x02(X\x02\0\0\0lsios\nsystem\n.", "os.system"),
        ("obj", b"\x80\x02(cos\nsystem\nX\x02\0\0\0lso.", "os.system"),
        (
            "newobj",
            b"\x80\x02csubprocess\nPopen\n)\x81.",
            "subprocess.Popen",
        ),
        (
            "reconstructor",
            b"\x80\x02ccopyreg\n_reconstructor\n(cos\nstat_result\nNNtR.",
            "copyreg._reconstructor",
        ),
        (
            "registry",
            b"\x80\x02\x82\x05)R.",
            "a name by its number in copyreg's registry",
        ),
        (
            "attributes",
            b"\x80\x02ccollections\nOrderedDict\n}b.",
            "the attributes of collections.OrderedDict",
        ),
        (
            "made",
            b"\x80\x02cargparse\nNamespace\n)R)R.",
            "something that is no name",
        ),
        (
            "getattr",
            b"\x80\x02c__builtin__\ngetattr\n)R.",
            "__builtin__.getattr",
        ),
        ("torch-load", b"\x80\x02ctorch\nload\n)R.", "torch.load"),
    ] {
        check(name, pickle, &format!("the pickle calls {called} at byte"));
    }
    // Several are told together, with their places.
    let two = b"\x80\x02cos\nsystem\n)Rcos\npopen\n)R\x86.";
    check("both", two, "os.system at byte 54");
    check("both", two, "os.popen at byte 66");
    // Lies about lengths.
    check(
        "long-text",
        b"\x80\x02X\xff\xff\xff\xffab.",
        "4294967295 bytes should follow, but",
    );
    check(
        "longer-text",
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\xffa.",
        "bytes should follow, but",
    );
    check(
        "frame",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7fN.",
        "a frame of 9223372036854775807 bytes",
    );
    check(
        "long-number",
        b"\x80\x02\x8b\xff\xff\xff\xff.",
        "a number of less than no bytes",
    );
    check("no-end", b"\x80\x02N", "1 bytes should follow, but 0 do");
    check("name", b"\x80\x02cos", "a name without an end");
    check(
        "utf-8",
        b"\x80\x02X\x01\0\0\0\xff.",
        "byte 0 of a text is not UTF-8",
    );
    // Misuse of the machine.
    check("empty", b"\x80\x02.", "the stack is empty");
    check("below-mark", b"\x80\x02N(\x85.", "the stack is empty");
    check("no-mark", b"\x80\x02t.", "there is no mark");
    check("memo", b"\x80\x02h\x07.", "the memo has no entry 7");
    check("odd", b"\x80\x02}(Nu.", "a key without a value");
    check("items", b"\x80\x02NNa.", "items for what is no list");
    check("protocol", b"\x80\x09N.", "protocol 9; 2 to 5 are read");
    check("text-form", b"(lp0\n.", "protocol 0");
    check("opcode", b"\x80\x02\xfe.", "there is no opcode 0xfe");
    // Cycles and depth.
    check(
        "cycle",
        b"\x80\x02}q\0X\x05\0\0\0modelh\0s.",
        "holds no tensors, only model",
    );
    check("list-cycle", b"\x80\x02]q\0h\0a.", "holds a list");
    let deep = [
        &b"\x80\x02"[..],
        &b"]".repeat(300_000),
        &b"a".repeat(299_999),
        b".",
    ]
    .concat();
    check("deep", &deep, "holds a list");
    let deep = [&b"\x80\x02N"[..], &b"\x85".repeat(300_000), b"."].concat();
    check("deep-tuples", &deep, "holds a list");
    let wrapped = b"}X\x05\0\0\0model".repeat(50_000);
    let deep = [&b"\x80\x02"[..], &wrapped, b"N", &b"s".repeat(50_000), b"."].concat();
    check("deep-dicts", &deep, "holds no tensors");
    check(
        "marks",
        &[&b"\x80\x02"[..], &b"(".repeat(100_000)].concat(),
        "more than 65536 marks",
    );
    // A bomb: every dictionary has the one before it eight times.
    let mut bomb = b"\x80\x02}q\0".to_vec();
    for level in 0..60u8 {
        bomb.extend(b"}(");
        for key in 0..8 {
            bomb.extend([b'K', key, b'h', level]);
        }
        bomb.extend([b'u', b'q', level + 1]);
    }
    bomb.push(b'.');
    check("bomb", &bomb, "holds no tensors");
    // Copies of a large mapping.
    let mut copies = b"\x80\x02}(".to_vec();
    copies.extend(b"NN".repeat(50_000));
    copies.extend(b"uq\0");
    copies.extend(b"ccollections\nOrderedDict\nh\0\x85R".repeat(1000));
    copies.push(b'.');
    check("copies", &copies, "entries are copied");
}

#[test]
fn tensors_beyond_their_storages_are_refused() {
    let check = |parts: [&[u8]; 4], expected: &str| {
        let [count, offset, sizes, strides] = parts;
        let found = open(&pickled(&tensor(count, offset, sizes, strides)), "storages");
        assert!(found.contains(expected), "{expected}: {found}");
    };
    let (huge, minus) = (
        b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"J\xff\xff\xff\xff",
    );
    let huge2 = [&huge[..], huge, b"\x86"].concat();
    let one = b"K\x01\x85";
    check(
        [b"K\x05", b"K\0", one, one],
        "of 5 elements of 4 bytes, but the file has 16 bytes of it",
    );
    check([huge, b"K\0", one, one], "but the file has 16 bytes of it");
    check([minus, b"K\0", one, one], "its storage is not described");
    check(
        [b"K\x04", b"K\x04", one, one],
        "tensor \"a\" reads beyond its storage",
    );
    check([b"K\x04", huge, one, one], "reads beyond its storage");
    check([b"K\x04", minus, one, one], "its offset");
    check(
        [b"K\x04", b"K\0", b"K\x05\x85", one],
        "reads beyond its storage",
    );
    check(
        [b"K\x04", b"K\0", &huge2, b"K\x01K\x01\x86"],
        "reads beyond its storage",
    );
    check(
        [b"K\x04", b"K\0", b"K\x02K\x02\x86", &huge2],
        "reads beyond its storage",
    );
    check(
        [b"K\x04", b"K\0", &huge2, b"K\0K\0\x86"],
        "repeats the elements",
    );
    check(
        [b"K\x04", b"K\0", b"K\x02\x85", b"K\x01K\x01\x86"],
        "has sizes [2] and strides [1, 1]",
    );
    check(
        [
            b"K\x04",
            b"K\0",
            b"K\x02\x85",
            &[&minus[..], b"\x85"].concat(),
        ],
        "its strides",
    );
    let many = [&b"("[..], &b"K\x01".repeat(100), b"t"].concat();
    check([b"K\x04", b"K\0", &many, &many], "more than 16 dimensions");
    // The same elements again and again, within reason.
    check([b"K\x04", b"K\0", b"K\x64\x85", b"K\0\x85"], "opened: a");
}

#[test]
fn archives_that_lie_are_refused() {
    let good = tensor(b"K\x04", b"K\0", b"K\x02\x85", b"K\x01\x85");
    let check = |name: &str, bytes: &[u8], expected: &str| {
        let found = open(bytes, name);
        assert!(found.contains(expected), "{name}: {expected}: {found}");
    };
    let archive = checks::archive;
    let storage = ("m/data/0", &[1; 16][..]);
    let file = pickled(&good);
    check("archive", &file, "opened: a");
    check("no-pickle", &archive(&[storage]), "has no data.pkl");
    check(
        "no-storage",
        &archive(&[("m/data.pkl", &good)]),
        "storage \"0\", whose bytes are not in the file",
    );
    check(
        "twice",
        &archive(&[("m/data.pkl", &good), storage, storage]),
        "is there twice",
    );
    check(
        "pickles",
        &archive(&[("m/data.pkl", &good), ("n/data.pkl", &good)]),
        "several data.pkl",
    );
    check(
        "order",
        &archive(&[("m/data.pkl", &good), storage, ("m/byteorder", b"big")]),
        "\"big\"-endian",
    );
    check(
        "short",
        &archive(&[("m/data.pkl", &good), ("m/data/0", &[1; 15])]),
        "has 15 bytes of it",
    );
    check("empty", b"", "this is no PyTorch file");
    check(
        "text",
        b"version https://git-lfs.github.com/spec/v1",
        "this is no PyTorch file",
    );
    let mut tar = vec![0; 600];
    tar[257..262].copy_from_slice(b"ustar");
    check("tar", &tar, "this is a tar archive");
    // Fields of the directory: each is changed to the largest number.
    let directory = file.windows(4).position(|w| w == b"PK\x01\x02").unwrap();
    let end = file.windows(4).position(|w| w == b"PK\x05\x06").unwrap();
    let changed = |at: usize, to: &[u8]| {
        let mut file = file.clone();
        file[at..at + to.len()].copy_from_slice(to);
        file
    };
    check(
        "method",
        &changed(directory + 10, &[8, 0]),
        "is compressed (method 8)",
    );
    check(
        "encrypted",
        &changed(directory + 8, &[1, 0]),
        "is encrypted",
    );
    check(
        "size",
        &changed(directory + 24, &[0xf0; 4]),
        "bytes for 4042322160",
    );
    check(
        "zip64",
        &changed(directory + 24, &[0xff; 4]),
        "lacks its zip64 sizes",
    );
    check(
        "offset",
        &changed(directory + 42, &[0xf0; 4]),
        "should begin at byte 4042322160, but does not",
    );
    check(
        "name",
        &changed(directory + 28, &[0xff, 0xff]),
        "ends in the middle of an entry",
    );
    check(
        "count",
        &changed(end + 8, &[9, 0, 9, 0]),
        "fewer entries than it says",
    );
    check("parts", &changed(end + 4, &[1, 0]), "one of several parts");
    check(
        "start",
        &changed(end + 16, &[0xf0; 4]),
        "the directory should be bytes",
    );
    check(
        "length",
        &changed(end + 12, &[0xf0; 4]),
        "the directory should be bytes",
    );
    check(
        "cut",
        &file[..file.len() - 30],
        "the directory at its end is missing",
    );
}

/// Files by torch, cut off everywhere and with a bit of every byte flipped: they open or say why not.
#[test]
fn damaged_files_never_panic() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("pytorch/tensors");
    let folder = checks::folder("damaged");
    for name in [
        "parameters-legacy.pt",
        "parameters-zip.pt",
        "views-legacy.pt",
    ] {
        let good = std::fs::read(root.join(name)).unwrap();
        for length in 0..good.len() {
            checks::pytorch(&good[..length], &folder);
        }
        for bit in 0..8 * good.len() {
            if bit % 8 != (bit / 8) % 8 {
                continue;
            }
            let mut bytes = good.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            checks::pytorch(&bytes, &folder);
        }
    }
    std::fs::remove_dir_all(folder).ok();
}
