//! Checkpoints that are not what they should be.

use std::time::{Duration, Instant};

use crate::common::{Chance, Folder, file, tensors};
use strata_converters::Checkpoint;

const GOOD: &str = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"BF16","shape":[1,2],"data_offsets":[8,12]}}"#;

fn open(bytes: &[u8]) -> Result<Checkpoint, String> {
    let folder = Folder::new();
    folder.write("model.safetensors", bytes);
    Checkpoint::open(&folder.files()).map_err(|e| e.to_string())
}

#[test]
fn a_good_file_opens_wherever_its_bytes_lie() {
    // Headers of every length modulo 8, so that elements are misaligned.
    for spaces in 0..9 {
        let header = GOOD.to_string() + &" ".repeat(spaces);
        let checkpoint = open(&file(&header, 12)).unwrap();
        let a = checkpoint.tensor("a").unwrap();
        assert_eq!(a.bytes(), [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(a.to_f32().len(), 2);
        assert_eq!(checkpoint.tensor("b").unwrap().shape(), [1, 2]);
        assert_eq!(checkpoint.bytes(), 12);
        assert_eq!(checkpoint.get("b").unwrap().dtype, "BF16");
    }
}

#[test]
fn faulty_files_are_refused_with_file_and_tensor() {
    let check = |bytes: &[u8], expected: &[&str]| {
        let message = open(bytes).expect_err(expected[0]);
        for expected in expected.iter().chain(&["model.safetensors"]) {
            assert!(message.contains(expected), "{expected}: {message}");
        }
    };
    let changed = |from: &str, to: &str| {
        assert!(GOOD.contains(from));
        file(&GOOD.replace(from, to), 12)
    };
    check(b"", &["the file has 0 bytes"]);
    check(b"1234567", &["the file has 7 bytes"]);
    check(
        &u64::MAX.to_le_bytes(),
        &["the header should have 18446744073709551615 bytes"],
    );
    check(&file(GOOD, 12)[..40], &["the header should have"]);
    check(&file("", 0), &["header: EOF"]);
    check(&file("[]", 0), &["header: invalid type"]);
    check(&file("{\"a\":", 0), &["header: tensor \"a\": EOF"]);
    check(&file(&"[".repeat(200_000), 0), &["header: "]);
    check(
        &file(
            &("{\"__metadata__\":".to_string() + &"[".repeat(200_000)),
            0,
        ),
        &["header: EOF"],
    );
    let mut latin = file(GOOD, 12);
    latin[12] = 0xff;
    check(&latin, &["byte 4 of the header is not UTF-8"]);
    check(
        &file(GOOD, 11),
        &["tensor \"b\": bytes 8 to 12 lie outside the 11"],
    );
    check(&file(GOOD, 13), &["the last 1 bytes belong to no tensor"]);
    check(&changed("[0,8]", "[8,0]"), &["tensor \"a\": bytes 8 to 0"]);
    check(
        &changed("[0,8]", "[0,4]"),
        &["tensor \"a\": has 4 bytes; [2] of F32 takes 8"],
    );
    check(
        &changed("[8,12]", "[6,10]"),
        &["tensor \"b\" overlap another's"],
    );
    check(
        &changed(
            "[1,2],\"data_offsets\":[8,12]",
            "[1],\"data_offsets\":[10,12]",
        ),
        &["2 bytes before tensor \"b\""],
    );
    check(
        &changed("[0,8]", "[0,18446744073709551615]"),
        &["tensor \"a\": bytes 0 to"],
    );
    check(
        &changed("[0,8]", "[0,184467440737095516150]"),
        &["tensor \"a\""],
    );
    check(&changed("[0,8]", "[-1,8]"), &["tensor \"a\""]);
    check(
        &changed("[2]", "[4294967296,4294967296,16]"),
        &["tensor \"a\": the shape [4294967296, 4294967296, 16] overflows"],
    );
    check(
        &changed("[2]", "[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,2]"),
        &["tensor \"a\": the shape has more than 16 dimensions"],
    );
    check(&changed("[2]", "2"), &["tensor \"a\""]);
    check(
        &changed("\"F32\"", "\"F33\""),
        &["tensor \"a\": the format has no element type \"F33\""],
    );
    check(
        &changed("\"b\"", "\"a\""),
        &["tensor \"a\": stands in the header twice"],
    );
    check(
        &changed("\"b\"", &format!("\"{}\"", "b".repeat(2000))),
        &["has more than 1024 bytes"],
    );
    // Together.
    check(
        &file(
            &GOOD.replace("[0,8]", "[0,4]").replace("[8,12]", "[8,13]"),
            12,
        ),
        &["tensor \"a\": has 4", "tensor \"b\": bytes 8 to 13"],
    );
    let many: Vec<String> = (0..500)
        .map(|i| format!("\"t{i}\":{{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,4]}}"))
        .collect();
    check(
        &file(&format!("{{{}}}", many.join(",")), 4),
        &["and 488 more faulty tensors"],
    );
}

#[test]
fn other_element_types_are_listed_but_not_read() {
    let checkpoint = open(&changed_type("F8_E4M3", 2)).unwrap();
    assert_eq!(checkpoint.get("a").unwrap().shape, [2]);
    let message = checkpoint.tensor("a").unwrap_err().to_string();
    assert_eq!(
        message,
        "model.safetensors: tensor \"a\": unsupported element type F8_E4M3; F32, F16 and BF16 are read, of GGUF files also blocks"
    );
    for (name, bytes) in [("I64", 16), ("F64", 16), ("BOOL", 2), ("F4", 1)] {
        assert!(
            open(&changed_type(name, bytes))
                .unwrap()
                .tensor("a")
                .is_err()
        );
    }
    assert!(open(&file(GOOD, 12)).unwrap().tensor("c").is_err());
}

fn changed_type(name: &str, bytes: usize) -> Vec<u8> {
    file(
        &format!("{{\"a\":{{\"dtype\":\"{name}\",\"shape\":[2],\"data_offsets\":[0,{bytes}]}}}}"),
        bytes,
    )
}

#[test]
fn an_index_and_its_files_must_agree() {
    let one = |name: &str| tensors(&[(name.into(), vec![2])], 1.0);
    let check = |index: &str, expected: &[&str]| {
        let folder = Folder::new();
        folder.write("x.safetensors", &one("a"));
        folder.write("y.safetensors", &one("b"));
        folder.write("z.safetensors", &one("b"));
        folder.write("broken.safetensors", b"");
        folder.write("model.safetensors.index.json", index.as_bytes());
        match Checkpoint::open(&folder.files()) {
            Ok(checkpoint) => {
                assert!(expected.is_empty(), "{index}");
                assert_eq!(checkpoint.get("b").unwrap().shard, "y.safetensors");
            }
            Err(error) => {
                let message = error.to_string();
                assert!(!expected.is_empty(), "{message}");
                for expected in expected {
                    assert!(message.contains(expected), "{expected}: {message}");
                }
            }
        }
    };
    check(
        r#"{"metadata": {"total_size": 16}, "weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}"#,
        &[],
    );
    check(
        r#"{"weight_map": {"a": "y.safetensors", "b": "x.safetensors", "c": "no.safetensors", "d": "../x", "e": "broken.safetensors", "f": "x.safetensors"}}"#,
        &[
            "says that \"a\" is in y.safetensors, but it is in x.safetensors",
            "says that \"b\" is in x.safetensors, but it is in y.safetensors",
            "says that \"f\" is in x.safetensors, but it is not there",
            "names no.safetensors, which is not there",
            "\"../x\" is no plain file name",
            "broken.safetensors: the file has 0 bytes",
        ],
    );
    check(
        r#"{"weight_map": {"a": "x.safetensors", "b": "z.safetensors", "c": "y.safetensors"}}"#,
        &[
            "tensor \"b\" is in y.safetensors and in z.safetensors",
            "says that \"c\" is in y.safetensors",
        ],
    );
    check(r#"{"weight_map": {}}"#, &["names no tensor"]);
    check(
        "{}",
        &["model.safetensors.index.json: missing field `weight_map`"],
    );
    check("", &["EOF"]);
}

#[test]
fn folders_without_weights_say_what_they_lack() {
    let check = |names: &[&str], expected: &str| {
        let folder = Folder::new();
        names
            .iter()
            .for_each(|n| folder.write(n, &tensors(&[("a".into(), vec![1])], 0.0)));
        let shown = match Checkpoint::open(&folder.files()) {
            Ok(checkpoint) => checkpoint.get("a").unwrap().shard.clone(),
            Err(error) => error.to_string(),
        };
        assert!(shown.contains(expected), "{shown}");
    };
    check(
        &[],
        "there are no weights: neither model.safetensors nor model.safetensors.index.json, pytorch_model.bin,",
    );
    check(
        &["pytorch_model.bin"],
        "pytorch_model.bin: this is no PyTorch file: it begins with [",
    );
    check(
        &["training_args.bin", "optimizer.pt"],
        "there are no weights",
    );
    check(
        &["consolidated.00.pth", "consolidated.01.pth"],
        "consolidated.00.pth, consolidated.01.pth are the pieces of one model's tensors",
    );
    check(&["a.pt", "b.pth"], "more than one other: a.pt, b.pth");
    check(&["a.pt", "model.safetensors"], "model.safetensors");
    check(&["only.safetensors"], "only.safetensors");
    check(
        &["a.safetensors", "b.safetensors"],
        "more than one other: a.safetensors, b.safetensors",
    );
    check(&["a.safetensors", "model.safetensors"], "model.safetensors");
    let folder = Folder::new();
    std::fs::create_dir(folder.path().join("model.safetensors")).unwrap();
    assert!(Checkpoint::open(&folder.files()).is_err());
}

#[test]
fn no_header_makes_it_panic() {
    let mut chance = Chance(7);
    let good = file(GOOD, 12);
    let folder = Folder::new();
    let (start, mut opened) = (Instant::now(), 0);
    while start.elapsed() < Duration::from_millis(1500) {
        let mut bytes = good.clone();
        chance.spoil(&mut bytes);
        folder.write("model.safetensors", &bytes);
        if let Ok(checkpoint) = Checkpoint::open(&folder.files()) {
            let names: Vec<String> = checkpoint.tensors().map(|(n, _)| n.into()).collect();
            for name in names {
                let _ = checkpoint.tensor(&name).map(|t| t.to_f32());
                opened += 1;
            }
        }
    }
    assert!(opened > 0);
}
