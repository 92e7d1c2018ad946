//! Kernels: CUDA C++ compiled for the device at hand, and kept for the next time.

use std::ffi::{CStr, CString};
use std::sync::Arc;

use cudarc::nvrtc::{result, sys};

use super::fault;
use crate::error::Result;

/// Where compiled kernels are kept between runs.
pub trait KernelCache: Send + Sync {
    /// What was stored under `key`, whole and unchanged; none if there is no such thing.
    fn load(&self, key: &str) -> Option<Vec<u8>>;
    /// Keeps `bytes`. A failure costs the next run some time and nothing else.
    fn store(&self, key: &str, bytes: &[u8]);
}

/// A file of kernels.
#[derive(Debug, Clone, Copy)]
pub struct Unit {
    /// Its name, for messages.
    pub name: &'static str,
    source: &'static str,
    /// The kernels in it.
    pub kernels: &'static [&'static str],
    /// The one architecture it is for, as the compiler names it with all of its instructions; none if it is
    /// for all.
    only: Option<&'static str>,
}

impl Unit {
    /// What to compile it for, where the GPU is an `architecture` such as `sm_90`; none if it is not for that.
    pub fn target<'a>(&self, architecture: &'a str) -> Option<&'a str> {
        match self.only {
            None => Some(architecture),
            Some(only) => (only.strip_suffix('a') == Some(architecture)).then_some(only),
        }
    }
}

macro_rules! unit {
    ($name:literal: $($kernel:literal),* $(,)?) => {
        unit!($name for None, $($kernel),*)
    };
    ($name:literal for $only:expr, $($kernel:literal),* $(,)?) => {
        Unit {
            name: $name,
            source: include_str!(concat!("kernels/", $name)),
            kernels: &[$($kernel),*],
            only: $only,
        }
    };
}

/// Files for the matrix units of this generation only.
const HOPPER: Option<&str> = Some("sm_90a");

/// All files of kernels.
pub const UNITS: [Unit; 25] = [
    unit!("elements.cu": "add", "scale", "activate", "add_bias", "embed", "gather", "combine",
        "convert", "round_rows", "fill_normal"),
    unit!("norms.cu": "rms_norm", "rms_norms", "layer_norm"),
    unit!("products.cu": "one_row_f32_2_1", "one_row_f32_1_1", "one_row_f32_1_2", "one_row_f32_1_4", "one_row_f16_2_1", "one_row_f16_1_1", "one_row_f16_1_2", "one_row_f16_1_4", "one_row_bf16_2_1", "one_row_bf16_1_1", "one_row_bf16_1_2", "one_row_bf16_1_4", "tiles_f32", "tiles_f16", "tiles_bf16"),
    unit!("row.cu": "row_2_1", "row_1_1", "row_1_2", "row_1_4", "row_gated_1", "row_gated_2",
        "row_gated_4"),
    unit!("row_blocks.cu": "row_q8_0", "row_q8_0_gated", "row_q6_k", "row_q6_k_gated", "row_q4_k",
        "row_q4_k_gated", "row_int8", "row_int8_gated", "row_fp8", "row_fp8_gated", "row_bf16", "row_bf16_gated"),
    unit!("int8.cu": "round_int8", "arrange_int8", "widen_int8", "units_int8", "units_int8_chosen",
        "scale_int8", "few_int8", "few_int8_chosen"),
    unit!("fp8.cu": "widen_fp8", "scale_fp8", "few_fp8_1", "few_fp8_2", "few_fp8_4", "few_fp8_chosen",
        "units_fp8", "units_fp8_chosen"),
    unit!("experts.cu": "expert_row_f32", "expert_row_f16", "expert_row_bf16", "expert_tiles_f32",
        "expert_tiles_f16", "expert_tiles_bf16", "sort_choices"),
    unit!("blocks_narrow.cu": "few_q8_0_1", "few_q8_0_4", "few_q8_0_8", "few_q8_0_chosen", "widen_q8_0", "few_q4_0_1", "few_q4_0_4", "few_q4_0_8", "few_q4_0_chosen", "widen_q4_0", "few_iq4_nl_1", "few_iq4_nl_4", "few_iq4_nl_8", "few_iq4_nl_chosen", "widen_iq4_nl", "round_blocks_32", "arrange"),
    unit!("blocks_fifths.cu": "few_q5_1_1", "few_q5_1_4", "few_q5_1_8", "few_q5_1_chosen", "widen_q5_1", "few_q5_0_1", "few_q5_0_4", "few_q5_0_8", "few_q5_0_chosen", "widen_q5_0", "few_q4_1_1", "few_q4_1_4", "few_q4_1_8", "few_q4_1_chosen", "widen_q4_1"),
    unit!("blocks_wide.cu": "few_q6_k_1", "few_q6_k_4", "few_q6_k_8", "few_q6_k_chosen", "widen_q6_k", "few_q5_k_1", "few_q5_k_4", "few_q5_k_8", "few_q5_k_chosen", "widen_q5_k", "few_q4_k_1", "few_q4_k_4", "few_q4_k_8", "few_q4_k_chosen", "widen_q4_k", "round_blocks_256"),
    unit!("blocks_units.cu": "round_units_q8_0", "units_q8_0_1", "units_q8_0_2", "units_q8_0_4",
        "units_q8_0_8", "round_units_q6_k", "units_q6_k_1", "units_q6_k_2", "units_q6_k_4",
        "units_q6_k_8", "round_units_q4_k", "units_q4_k_1", "units_q4_k_2", "units_q4_k_4",
        "units_q4_k_8"),
    unit!("blocks_rare.cu": "few_iq4_xs_1", "few_iq4_xs_4", "few_iq4_xs_8", "few_iq4_xs_chosen", "widen_iq4_xs", "few_q3_k_1", "few_q3_k_4", "few_q3_k_8", "few_q3_k_chosen", "widen_q3_k", "few_q2_k_1", "few_q2_k_4", "few_q2_k_8", "few_q2_k_chosen", "widen_q2_k"),
    unit!("conv1d.cu": "conv1d_step", "conv1d_rows", "conv1d_state"),
    unit!("selective_scan.cu": "selective_scan_1", "selective_scan_2", "selective_scan_4",
        "selective_scan_8", "selective_scan_groups_1", "selective_scan_groups_2",
        "selective_scan_groups_4", "selective_scan_step_1", "selective_scan_step_2",
        "selective_scan_step_4", "selective_scan_given_1", "selective_scan_given_2", "selective_scan_given_4"),
    unit!("ssd_scan.cu": "ssd_scan_1", "ssd_scan_2", "ssd_scan_4", "ssd_scan_8", "ssd_scan_16",
        "ssd_scan_32", "ssd_scan_pairs_1", "ssd_scan_pairs_2", "ssd_scan_pairs_4", "ssd_scan_pairs_8",
        "ssd_scan_pairs_16", "ssd_scan_pairs_32", "ssd_scan_step_1", "ssd_scan_step_2", "ssd_scan_step_4", "ssd_scan_step_8",
        "ssd_scan_step_16", "ssd_scan_step_32"),
    unit!("ssd_chunked.cu": "ssd_scores", "ssd_chunked_4", "ssd_chunked_8", "ssd_keep"),
    unit!("s4d_scan.cu": "s4d_scan"),
    unit!("mamba3_scan.cu": "mamba3_scan"),
    unit!("attention.cu": "rope", "kv_write", "kv_write_bytes", "attention", "attention_bytes", "attention_sum"),
    unit!("attention_units.cu": "attention_units_64", "attention_units_80", "attention_units_96",
        "attention_units_128"),
    unit!("route.cu": "route", "likeliest", "likeliest_parts"),
    unit!("expert_units.cu": "expert_units"),
    unit!("attention_hopper.cu" for HOPPER, "attention_hopper_64", "attention_hopper_80",
        "attention_hopper_96", "attention_hopper_128", "attention_hopper_192", "attention_hopper_256"),
    unit!("ssd_hopper.cu" for HOPPER, "ssd_prepare_64", "ssd_segments_64", "ssd_hopper_64",
        "ssd_prepare_128", "ssd_segments_128", "ssd_hopper_128"),
];

/// What the files include: name and text.
const HEADERS: [(&CStr, &str); 10] = [
    (c"after.cuh", include_str!("kernels/after.cuh")),
    (c"attention.cuh", include_str!("kernels/attention.cuh")),
    (c"blocks.cuh", include_str!("kernels/blocks.cuh")),
    (c"common.cuh", include_str!("kernels/common.cuh")),
    (c"experts.cuh", include_str!("kernels/experts.cuh")),
    (c"fp8.cuh", include_str!("kernels/fp8.cuh")),
    (c"hopper.cuh", include_str!("kernels/hopper.cuh")),
    (c"norm.cuh", include_str!("kernels/norm.cuh")),
    (c"products.cuh", include_str!("kernels/products.cuh")),
    (c"scan.cuh", include_str!("kernels/scan.cuh")),
];

/// Denormals, divisions and roots as IEEE has them: results are compared with the CPU's.
const OPTIONS: [&str; 2] = ["--std=c++17", "--ptxas-options=-v"];

/// The version of the compiler, which must have been loaded.
pub(super) fn version() -> Result<(i32, i32)> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: two numbers are written.
    let status = unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) };
    status
        .result()
        .map_err(|e| fault(format!("NVRTC does not say its version: {:?}", e.0)))?;
    Ok((major, minor))
}

/// All kernels for an architecture, file by file, from the cache where it has them; what it lacks is compiled
/// on as many threads as there are files. None for files of another architecture.
pub(super) fn compile_all(
    architecture: &str,
    cache: Option<&Arc<dyn KernelCache>>,
) -> Result<Vec<Option<Vec<u8>>>> {
    let compiler = version()?;
    let one = |unit: &'static Unit| {
        let Some(target) = unit.target(architecture) else {
            return Ok(None);
        };
        let key = key(unit, target, compiler);
        if let Some(found) = cache.and_then(|c| c.load(&key)) {
            return Ok(Some(found));
        }
        let cubin = compile(unit, target)?.cubin;
        if let Some(cache) = cache {
            cache.store(&key, &cubin);
        }
        Ok(Some(cubin))
    };
    std::thread::scope(|scope| {
        let running: Vec<_> = UNITS
            .iter()
            .map(|unit| scope.spawn(move || one(unit)))
            .collect();
        let done = running.into_iter().map(|r| {
            r.join()
                .unwrap_or_else(|_| Err(fault("a thread that compiled kernels failed".into())))
        });
        done.collect()
    })
}

/// A compiled file, and what the compiler had to say of it.
pub struct Compiled {
    /// Machine code.
    pub cubin: Vec<u8>,
    /// Registers and spills of each kernel, among other things.
    pub log: String,
}

/// Compiles a file for an architecture such as `sm_90`. The compiler must have been loaded.
pub fn compile(unit: &Unit, architecture: &str) -> Result<Compiled> {
    let text = |s: &str| CString::new(s).map_err(|_| fault(format!("{}: a zero byte", unit.name)));
    let (source, name) = (text(unit.source)?, text(unit.name)?);
    let headers: Vec<CString> = HEADERS
        .iter()
        .map(|(_, h)| text(h))
        .collect::<Result<_>>()?;
    let texts: Vec<_> = headers.iter().map(|h| h.as_ptr()).collect();
    let names: Vec<_> = HEADERS.iter().map(|(n, _)| n.as_ptr()).collect();
    let mut program = Program(std::ptr::null_mut());
    // SAFETY: all strings live until the program is made, which copies them.
    let made = unsafe {
        sys::nvrtcCreateProgram(
            &raw mut program.0,
            source.as_ptr(),
            name.as_ptr(),
            texts.len() as i32,
            texts.as_ptr(),
            names.as_ptr(),
        )
    };
    made.result()
        .map_err(|e| fault(format!("NVRTC takes no {}: {:?}", unit.name, e.0)))?;
    let mut options = vec![format!("--gpu-architecture={architecture}")];
    options.extend(OPTIONS.map(String::from));
    // SAFETY: the program was made above and is destroyed after this.
    let done = unsafe { result::compile_program(program.0, &options) };
    let log = program.log();
    done.map_err(|e| {
        fault(format!(
            "{} cannot be compiled for {architecture} ({:?}):\n{log}",
            unit.name, e.0
        ))
    })?;
    let cubin = program.cubin().ok_or_else(|| {
        fault(format!(
            "NVRTC gave no code of {} for {architecture}",
            unit.name
        ))
    })?;
    Ok(Compiled { cubin, log })
}

/// A program of the compiler's.
struct Program(sys::nvrtcProgram);

impl Program {
    fn log(&self) -> String {
        // SAFETY: the program is alive.
        let log = unsafe { result::get_program_log(self.0) };
        let bytes: Vec<u8> = log.unwrap_or_default().iter().map(|c| *c as u8).collect();
        String::from_utf8_lossy(&bytes)
            .trim_end_matches('\0')
            .to_string()
    }

    fn cubin(&self) -> Option<Vec<u8>> {
        let mut size = 0;
        // SAFETY: the program is alive; one number is written.
        let status = unsafe { sys::nvrtcGetCUBINSize(self.0, &raw mut size) };
        if status.result().is_err() || size == 0 {
            return None;
        }
        let mut bytes = vec![0u8; size];
        // SAFETY: there is room for as many bytes as were announced.
        let status = unsafe { sys::nvrtcGetCUBIN(self.0, bytes.as_mut_ptr().cast()) };
        status.result().is_ok().then_some(bytes)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: made by the compiler, destroyed once; there is nothing to do about a failure.
            let _ = unsafe { result::destroy_program(self.0) };
        }
    }
}

/// What a compiled file depends on, in a name: text, headers, options, architecture and compiler.
fn key(unit: &Unit, architecture: &str, (major, minor): (i32, i32)) -> String {
    let compiler = format!("{major}.{minor}");
    let mut hash: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    let parts = HEADERS.iter().map(|(_, text)| *text);
    let parts = parts
        .chain(OPTIONS)
        .chain([unit.source, architecture, &compiler]);
    for part in parts {
        for byte in part.bytes().chain([0]) {
            hash =
                (hash ^ u128::from(byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
        }
    }
    format!(
        "{}-{architecture}-{hash:032x}",
        unit.name.trim_end_matches(".cu")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_one_architecture_are_for_no_other() {
        let of = |name: &str| UNITS.iter().find(|u| u.name == name).unwrap();
        let targets = |name| ["sm_80", "sm_90", "sm_100"].map(|a| of(name).target(a));
        assert_eq!(
            targets("norms.cu"),
            [Some("sm_80"), Some("sm_90"), Some("sm_100")]
        );
        assert_eq!(targets("ssd_hopper.cu"), [None, Some("sm_90a"), None]);
    }

    #[test]
    fn keys_tell_files_and_architectures_apart() {
        let mut keys: Vec<String> = UNITS
            .iter()
            .flat_map(|u| ["sm_80", "sm_90"].map(|a| key(u, a, (13, 0))))
            .collect();
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), 2 * UNITS.len());
    }
}
