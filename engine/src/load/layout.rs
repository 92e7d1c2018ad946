//! The devices that a user named, and what each of them runs.

use std::collections::HashSet;
use std::sync::Arc;

use strata_kernels::cpu::Cpu;
use strata_kernels::{Backend, Rank};
use strata_layers::Graph;

use super::{Error, LoadOptions, Result, backend_at};
use crate::placement::{self, Parallel, Spot};

/// A device as it is named: `cuda:1`, or with a limit of its memory `cuda:1=40GB`. A limit alone is a device that is
/// not there, for estimates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    /// What was said.
    pub said: String,
    /// `cpu`, `cuda:1`; empty of a limit alone.
    pub name: String,
    /// Most bytes that it may take.
    pub limit: Option<u64>,
}

/// The devices of `--device`, in their order.
pub fn named(devices: &str) -> Result<Vec<Named>> {
    let one = |said: &str| {
        let said = said.trim().to_string();
        let (name, limit) = match said.split_once('=') {
            Some((name, limit)) => (name.to_string(), Some(limit)),
            None if said.starts_with(|c: char| c.is_ascii_digit()) => (String::new(), Some(&*said)),
            None => (said.clone(), None),
        };
        let bytes = |text: &str| {
            bytes_of(text).ok_or_else(|| {
                Error::Input(format!(
                    "--device {devices}: {text:?} is no size; expected such as 80GB, 24GiB or 500MB"
                ))
            })
        };
        let limit = limit.map(bytes).transpose()?;
        Ok(Named { said, name, limit })
    };
    devices.split(',').map(one).collect()
}

/// `80GB`, `24GiB`, `500MB`, `1000`.
fn bytes_of(text: &str) -> Option<u64> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let by = match unit.trim().to_ascii_uppercase().as_str() {
        "" | "B" => 1.0,
        "KB" => 1e3,
        "MB" => 1e6,
        "GB" | "G" => 1e9,
        "TB" => 1e12,
        "KIB" => 1024.0,
        "MIB" => 1024.0 * 1024.0,
        "GIB" => 1024.0 * 1024.0 * 1024.0,
        _ => return None,
    };
    let bytes = number.parse::<f64>().ok()? * by;
    (bytes >= 1.0 && bytes < 1e18).then_some(bytes as u64)
}

/// The devices, in the order in which they were named.
pub(super) struct Devices {
    pub backends: Vec<Arc<dyn Backend>>,
    pub names: Vec<String>,
    /// Bytes that each has room for; none for the host's memory without a limit.
    pub rooms: Vec<Option<u64>>,
    /// The first CPU among them.
    pub cpu: Option<Arc<Cpu>>,
    /// The CPU beside devices with memory of their own, where experts are to stay with it.
    pub host: Option<Arc<dyn Backend>>,
}

impl Devices {
    /// Opens each. One that is named twice is two devices.
    pub fn open(options: &LoadOptions) -> Result<Self> {
        let named = named(&options.device)?;
        let hosts = named.iter().filter(|n| n.name == "cpu").count();
        let together = matches!(options.parallel, Parallel::Tensor | Parallel::Expert);
        let threads = match (options.threads, together && hosts > 1) {
            (threads, false) => threads,
            // Ranks compute at the same time.
            (threads, true) => {
                let all = || std::thread::available_parallelism().map_or(1, usize::from);
                Some((threads.unwrap_or_else(all) / hosts).max(1))
            }
        };
        let mut devices = Devices {
            backends: Vec::new(),
            names: Vec::new(),
            rooms: Vec::new(),
            cpu: None,
            host: None,
        };
        for device in named {
            if device.name.is_empty() && device.limit.is_some() {
                return Err(Error::Input(format!(
                    "--device {}: a size alone is for `strata plan estimate`; name a device, such as cuda:0={0}",
                    device.said
                )));
            }
            let (backend, host) = backend_at(&device.name, threads, &options.cuda)?;
            let free = backend.memory()?.map(|(free, _)| free);
            if options.experts_on_host && free.is_some() && devices.host.is_none() {
                devices.host = Some(backend_at("cpu", options.threads, &options.cuda)?.0);
            }
            devices.rooms.push(match (device.limit, free) {
                (Some(limit), Some(free)) => Some(limit.min(free)),
                (limit, free) => limit.or(free),
            });
            devices.backends.push(backend);
            devices.names.push(device.said);
            devices.cpu = devices.cpu.or(host);
        }
        // One that is named more than once has its memory once.
        let own = devices.rooms.clone();
        for (i, name) in devices.names.iter().enumerate() {
            let times = devices.names.iter().filter(|n| *n == name).count() as u64;
            let shares = backend_memory(name) && times > 1;
            devices.rooms[i] = own[i].map(|room| if shares { room / times } else { room });
        }
        Ok(devices)
    }

    /// The devices' names and rooms.
    pub fn rooms(&self) -> Vec<(String, Option<u64>)> {
        let names = self.names.iter().cloned();
        names.zip(self.rooms.iter().copied()).collect()
    }

    /// The paths of weights that stay with the host.
    pub fn hosted(
        &self,
        options: &LoadOptions,
        graph: &Graph,
        notes: &mut Vec<String>,
    ) -> HashSet<String> {
        if !options.experts_on_host {
            return HashSet::new();
        }
        let experts = placement::experts(graph);
        if experts.is_empty() {
            notes.push("--experts cpu changes nothing: the model has no experts".into());
        } else if self.host.is_none() {
            notes.push("--experts cpu changes nothing: the model is in the host's memory".into());
            return HashSet::new();
        }
        experts
    }

    /// A rank for each device, where the spots are those of ranks.
    pub fn ranks(&self, spots: &[Spot]) -> Vec<Option<Rank>> {
        if spots.iter().all(|s| s.rank.is_none()) {
            return vec![None; spots.len()];
        }
        Rank::all(&self.backends).into_iter().map(Some).collect()
    }
}

/// Whether a device's memory is what the driver says, rather than a limit that was given.
fn backend_memory(said: &str) -> bool {
    !said.contains('=')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_with_and_without_limits() {
        let found = named("cuda:1=24GiB, cpu,80GB").unwrap();
        let parts: Vec<_> = found.iter().map(|n| (n.name.as_str(), n.limit)).collect();
        let expected = [
            ("cuda:1", Some(24 << 30)),
            ("cpu", None),
            ("", Some(80_000_000_000)),
        ];
        assert_eq!(parts, expected);
        for wrong in ["cuda=", "cpu=x", "80XB", "cpu=0GB", "cpu=-1GB"] {
            let error = named(wrong).unwrap_err().to_string();
            assert!(error.contains("is no size"), "{wrong}: {error}");
        }
    }
}
