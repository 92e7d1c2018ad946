//! Every CUDA kernel compiles for every architecture, without spills and within its registers. Needs
//! NVIDIA's run-time compiler and no GPU:
//!
//! ```text
//! python3 -m venv cuda && cuda/bin/pip install nvidia-cuda-nvrtc==13.0.88
//! VIRTUAL_ENV=$PWD/cuda cargo test --test cuda_kernels -- --nocapture
//! ```
//!
//! Where there is no compiler, the test says so and passes.

use std::collections::BTreeSet;

use strata::load::CudaPlaces;
use strata_kernels::cuda::{UNITS, Unit, compile, load_compiler};

/// From Ampere to the Blackwells of data centres and of workstations.
const ARCHITECTURES: [&str; 4] = ["sm_80", "sm_90", "sm_100", "sm_120"];

/// Most registers of a thread: two blocks of 128 threads and more share a processor.
const REGISTERS: usize = 192;
/// Kernels that keep queries, weights on their way, sums or states in registers, one block or two a processor, may
/// use all there are.
const FULL: ([&str; 4], usize) = (
    [
        "attention_units_",
        "attention_hopper_",
        "ssd_hopper_",
        "units_",
    ],
    255,
);

/// What the compiler says of a kernel.
#[derive(Debug, PartialEq)]
struct Used {
    kernel: String,
    registers: usize,
    spilled: usize,
}

/// The kernels of a log of `ptxas -v`.
fn used(log: &str) -> Vec<Used> {
    let number_before = |line: &str, words: &str| -> usize {
        let before = line.split(words).next().unwrap_or_default();
        before
            .split_whitespace()
            .next_back()
            .unwrap()
            .parse()
            .unwrap()
    };
    let mut all: Vec<Used> = Vec::new();
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            all.push(Used {
                kernel: rest.split('\'').next().unwrap().into(),
                registers: 0,
                spilled: 0,
            });
        }
        let Some(last) = all.last_mut() else { continue };
        if line.contains("bytes spill stores") {
            last.spilled = number_before(line, " bytes spill stores")
                + number_before(line, " bytes spill loads");
        }
        if let Some((_, rest)) = line.split_once("Used ") {
            last.registers = number_before(rest, " registers");
        }
    }
    all
}

fn faults_of(unit: &Unit, architecture: &str) -> Vec<String> {
    let Some(target) = unit.target(architecture) else {
        return Vec::new();
    };
    let compiled = match compile(unit, target) {
        Ok(compiled) => compiled,
        Err(error) => return vec![error.to_string()],
    };
    let used = used(&compiled.log);
    let found: BTreeSet<&str> = used.iter().map(|u| u.kernel.as_str()).collect();
    let listed: BTreeSet<&str> = unit.kernels.iter().copied().collect();
    let mut faults = Vec::new();
    if found != listed {
        faults.push(format!("{}: has {found:?}, lists {listed:?}", unit.name));
    }
    for u in &used {
        assert!(u.registers > 0, "{}: {}", u.kernel, compiled.log);
        let most = if FULL.0.iter().any(|kind| u.kernel.starts_with(kind)) {
            FULL.1
        } else {
            REGISTERS
        };
        if u.spilled > 0 || u.registers > most {
            faults.push(format!("{architecture}: {u:?}, at most {most}, 0"));
        }
    }
    faults
}

#[test]
fn every_kernel_compiles_within_its_registers() {
    let places = CudaPlaces::from_env(|name| std::env::var(name).ok());
    if let Err(error) = load_compiler(&places.libraries) {
        println!("skipped: {error}");
        return;
    }
    let mut faults = Vec::new();
    for architecture in ARCHITECTURES {
        for unit in &UNITS {
            faults.extend(faults_of(unit, architecture));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn logs_are_read() {
    let log = "ptxas info    : Compiling entry function 'add' for 'sm_90'
ptxas info    : Function properties for add
ptxas         .     8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 48 registers, used 1 barriers, 16896 bytes smem
ptxas info    : Compiling entry function 'mul' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 7 registers";
    let add = Used {
        kernel: "add".into(),
        registers: 48,
        spilled: 16,
    };
    let mul = Used {
        kernel: "mul".into(),
        registers: 7,
        spilled: 0,
    };
    assert_eq!(used(log), [add, mul]);
}
