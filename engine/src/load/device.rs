//! Devices by their names, and what a GPU needs to be found.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use strata_kernels::Backend;
use strata_kernels::cpu::{Cpu, CpuOptions};
use strata_kernels::cuda::{Cuda, CudaOptions, KernelCache};
use strata_kernels::reference::Reference;
use xxhash_rust::xxh3::xxh3_128;

use super::{Error, Result};

/// A backend, and the CPU behind it where there is one.
pub type Device = (Arc<dyn Backend>, Option<Arc<Cpu>>);

/// Where a GPU's libraries may be, and where its compiled kernels are kept.
#[derive(Debug, Clone, Default)]
pub struct CudaPlaces {
    /// Folders to look in, in this order, after the system's loader.
    pub libraries: Vec<PathBuf>,
    /// Folder of compiled kernels; none compiles them each time.
    pub kernels: Option<PathBuf>,
}

impl CudaPlaces {
    /// From CUDA_HOME and its like, active Python environments, XDG_CACHE_HOME, and where systems put
    /// things.
    pub fn from_env(get: impl Fn(&str) -> Option<String>) -> Self {
        let mut libraries = Vec::new();
        for home in ["CUDA_HOME", "CUDA_PATH", "CUDA_ROOT"]
            .into_iter()
            .filter_map(&get)
        {
            let home = Path::new(&home);
            libraries.extend(["lib64", "lib", "targets/x86_64-linux/lib"].map(|l| home.join(l)));
        }
        let named = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(&get);
        let mut environments: Vec<PathBuf> = named.map(PathBuf::from).collect();
        let path = get("PATH").unwrap_or_default();
        for folder in std::env::split_paths(&path) {
            let environment = folder.parent().map(Path::to_path_buf);
            environments.extend(environment.filter(|e| e.join("pyvenv.cfg").is_file()));
        }
        for environment in environments {
            let versions = std::fs::read_dir(environment.join("lib"));
            for version in versions.into_iter().flatten().flatten() {
                let nvidia = version.path().join("site-packages/nvidia");
                libraries
                    .extend(["cu13/lib", "cuda_nvrtc/lib", "cublas/lib"].map(|l| nvidia.join(l)));
            }
        }
        let systems = [
            "/usr/local/cuda/lib64",
            "/usr/local/cuda/targets/x86_64-linux/lib",
            "/opt/cuda/lib64",
            "/usr/local/nvidia/lib64",
            "/usr/lib/x86_64-linux-gnu",
        ];
        libraries.extend(systems.map(PathBuf::from));
        // Folders that are not there need no mention in an error.
        libraries.retain(|l| l.is_dir());
        CudaPlaces {
            libraries,
            kernels: cache_folder(get).map(|c| c.join("kernels")),
        }
    }
}

/// Where what can be computed again is kept: in XDG_CACHE_HOME, or in the home folder.
pub fn cache_folder(get: impl Fn(&str) -> Option<String>) -> Option<PathBuf> {
    let cache = get("XDG_CACHE_HOME")
        .filter(|c| !c.is_empty())
        .map(PathBuf::from);
    let cache = cache.or_else(|| get("HOME").map(|h| Path::new(&h).join(".cache")));
    cache.map(|c| c.join("strata"))
}

/// The backend of a device; a GPU's libraries are looked for where the system's loader does.
pub fn backend(device: &str, threads: Option<usize>) -> Result<Device> {
    backend_at(device, threads, &CudaPlaces::default())
}

/// The backend of a device.
pub fn backend_at(device: &str, threads: Option<usize>, cuda: &CudaPlaces) -> Result<Device> {
    let available = || std::thread::available_parallelism().map_or(1, usize::from);
    match device {
        "cpu" => {
            let threads = threads.unwrap_or_else(available);
            let cpu = Arc::new(Cpu::new(CpuOptions {
                threads,
                ..CpuOptions::default()
            }));
            return Ok((cpu.clone(), Some(cpu)));
        }
        "reference" => return Ok((Arc::new(Reference), None)),
        _ => {}
    }
    let ordinal = match device.split_once(':') {
        None if device == "cuda" => Some(0),
        Some(("cuda", number)) => number.parse().ok(),
        _ => None,
    };
    let Some(ordinal) = ordinal else {
        return Err(Error::Input(format!(
            "--device {device}: devices are cpu, cuda, cuda:N and reference"
        )));
    };
    let cache = |folder: &PathBuf| -> Arc<dyn KernelCache> { Arc::new(Folder(folder.clone())) };
    let cuda = Cuda::new(CudaOptions {
        ordinal,
        libraries: cuda.libraries.clone(),
        cache: cuda.kernels.as_ref().map(cache),
    })?;
    Ok((Arc::new(cuda), None))
}

/// A folder of compiled kernels, or of other bytes that can be computed again: a file each, with its checksum at the
/// end.
pub(super) struct Folder(pub PathBuf);

const CHECKSUM: usize = 16;

impl KernelCache for Folder {
    fn load(&self, key: &str) -> Option<Vec<u8>> {
        let mut bytes = std::fs::read(self.0.join(key)).ok()?;
        let end = bytes.len().checked_sub(CHECKSUM)?;
        let whole = xxh3_128(&bytes[..end]).to_le_bytes() == bytes[end..];
        bytes.truncate(end);
        whole.then_some(bytes)
    }

    fn store(&self, key: &str, bytes: &[u8]) {
        // Under a name of its own first, so that nobody reads half a file.
        let own = self.0.join(format!("{key}.{}.part", std::process::id()));
        let write = || {
            std::fs::create_dir_all(&self.0)?;
            let mut file = std::fs::File::create(&own)?;
            file.write_all(bytes)?;
            file.write_all(&xxh3_128(bytes).to_le_bytes())?;
            std::fs::rename(&own, self.0.join(key))
        };
        if write().is_err() {
            let _ = std::fs::remove_file(&own);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_kernel_is_not_loaded() {
        let folder = std::env::temp_dir().join(format!("strata-kernels-{}", std::process::id()));
        let cache = Folder(folder.clone());
        assert_eq!(cache.load("a"), None);
        cache.store("a", b"machine code");
        assert_eq!(cache.load("a").as_deref(), Some(&b"machine code"[..]));
        for damaged in [&b""[..], b"short", b"machine code but longer than it was"] {
            std::fs::write(folder.join("a"), damaged).unwrap();
            assert_eq!(cache.load("a"), None);
        }
        cache.store("a", b"again");
        assert_eq!(cache.load("a").as_deref(), Some(&b"again"[..]));
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn places_come_from_the_environment() {
        let home = std::env::temp_dir().join(format!("strata-places-{}", std::process::id()));
        let nvidia = home.join("lib/python3.12/site-packages/nvidia/cu13/lib");
        std::fs::create_dir_all(&nvidia).unwrap();
        let get = |name: &str| match name {
            "VIRTUAL_ENV" => Some(home.display().to_string()),
            "HOME" => Some("/home/someone".into()),
            _ => None,
        };
        let places = CudaPlaces::from_env(get);
        std::fs::remove_dir_all(&home).unwrap();
        assert_eq!(places.libraries.first(), Some(&nvidia));
        let kernels = Path::new("/home/someone/.cache/strata/kernels");
        assert_eq!(places.kernels.as_deref(), Some(kernels));
    }

    #[test]
    fn a_device_that_is_not_there_is_an_error() {
        for device in ["cuda:", "cuda:x", "cuda1", "gpu", "cuda:4000000000"] {
            assert!(backend(device, None).is_err(), "{device}");
        }
    }
}
