//! Finding the driver and NVIDIA's libraries, before anything calls them: the bindings load libraries
//! lazily and panic where one is missing, even while they print an error.

use std::path::PathBuf;

use cudarc::{cublaslt, driver, nvrtc};
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use super::fault;
use crate::error::Result;

/// The driver's version that the bindings are made for: CUDA 13.0.
const DRIVER: i32 = 13_000;

/// Loads the driver. Fails when there is none, or one that is too old.
pub(super) fn driver() -> Result<()> {
    // SAFETY: loads a library and looks at nothing in it.
    if !unsafe { driver::sys::is_culib_present() } {
        return Err(fault(
            "no NVIDIA driver was found (libcuda.so.1): there is no GPU here, or its driver is not installed; use --device cpu".into(),
        ));
    }
    let mut version = 0;
    // SAFETY: the library is there, and every driver has this function.
    let status = unsafe { driver::sys::cuDriverGetVersion(&raw mut version) };
    if status != driver::sys::CUresult::CUDA_SUCCESS || version < DRIVER {
        return Err(fault(format!(
            "the driver supports CUDA {}.{}; 13.0 is needed, which driver 580 and later support",
            version / 1000,
            version % 1000 / 10
        )));
    }
    Ok(())
}

/// Loads the compiler of kernels.
pub(super) fn compiler(folders: &[PathBuf]) -> Result<()> {
    // The compiler looks for its other half by name only, so that is loaded first where it stands.
    let halves: Vec<String> = (0..10)
        .map(|minor| format!("libnvrtc-builtins.so.13.{minor}"))
        .collect();
    load("nvrtc", folders, &halves, "libnvrtc.so.13", || {
        // SAFETY: as above.
        unsafe { nvrtc::sys::is_culib_present() }
    })
}

/// Loads the library of matrix products.
pub(super) fn products(folders: &[PathBuf]) -> Result<()> {
    load("cublasLt", folders, &[], "libcublasLt.so.13", || {
        // SAFETY: as above.
        unsafe { cublaslt::sys::is_culib_present() }
    })
}

/// Loads a library from one of `folders`, unless the loader knows it. A library that is loaded by its
/// path is found by its name from then on.
fn load(
    name: &str,
    folders: &[PathBuf],
    before: &[String],
    file: &str,
    present: impl Fn() -> bool,
) -> Result<()> {
    if present() {
        return Ok(());
    }
    let mut tried = Vec::new();
    for folder in folders {
        let path = folder.join(file);
        for other in before {
            keep(&folder.join(other)).unwrap_or_default();
        }
        match keep(&path) {
            Ok(()) if present() => return Ok(()),
            Ok(()) => tried.push(format!("{} (of another version)", path.display())),
            Err(why) => tried.push(why),
        }
    }
    let tried = if tried.is_empty() {
        "where the system's loader looks".into()
    } else {
        format!("by the system's loader, and as {}", tried.join(", "))
    };
    Err(fault(format!(
        "lib{name} of CUDA 13 was not found: looked for {tried}; install the CUDA toolkit or `pip install cuda-toolkit[nvrtc,cublas]==13.0.2` and set CUDA_HOME or VIRTUAL_ENV"
    )))
}

/// Loads a library and keeps it for as long as the process lives.
fn keep(path: &std::path::Path) -> std::result::Result<(), String> {
    // SAFETY: a library of NVIDIA's, whose initialisers may run at any time; it is never unloaded.
    let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) };
    match library {
        Ok(library) => {
            std::mem::forget(library);
            Ok(())
        }
        Err(error) => Err(error.to_string()),
    }
}
