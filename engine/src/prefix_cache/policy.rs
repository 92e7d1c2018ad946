//! Which states are kept: data, read from a text such as `every=2048; ends; branches; budget=4GiB; spill=DIR`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Which states are kept, and how many bytes of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Policy {
    /// `every=2048`: at every multiple of so many tokens.
    pub every: Option<usize>,
    /// `ends`: before the last token of a prompt, where the same prompt can go on from, and at the end of what was
    /// generated.
    pub ends: bool,
    /// `branches`: where a prompt leaves what is known.
    pub branches: bool,
    /// `wait=256`: a prompt that begins with so many tokens that another is reading, or more, waits for it, whose state is
    /// kept where the two part.
    pub wait: Option<usize>,
    /// `budget=4GiB`: most bytes of memory, pages and slots together. Without it as many as there are.
    pub budget: Option<u64>,
    /// `spill=DIR`: a folder that gets as files what the memory has no room for.
    pub spill: Option<PathBuf>,
    /// `disk=100GB`: most bytes of those files. Without it as many as there are.
    pub disk: Option<u64>,
}

/// All that is wrong with a policy, one fault a line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.join("\n"))]
pub struct BadPolicy(pub Vec<String>);

impl Policy {
    /// A state every 2048 tokens, at ends and where prompts part, in 4 GiB; a beginning of 256 tokens is read once.
    pub fn standard() -> Self {
        Policy {
            every: Some(2048),
            ends: true,
            branches: true,
            wait: Some(256),
            budget: Some(4 << 30),
            ..Policy::default()
        }
    }

    fn set(&mut self, part: &str) -> Result<(), String> {
        let (key, value) = match part.split_once('=') {
            Some((key, value)) => (key.trim(), Some(value.trim())),
            None => (part, None),
        };
        let wants = |what: &str| format!("`{key}` wants {what}, such as `{}`", example(key));
        match (key, value) {
            ("ends", None) => self.ends = true,
            ("branches", None) => self.branches = true,
            ("ends" | "branches", Some(_)) => return Err(format!("`{key}` takes no value")),
            ("every", value) => {
                self.every = Some(count(value).ok_or_else(|| wants("a number of tokens above 0"))?);
            }
            ("wait", value) => {
                self.wait = Some(count(value).ok_or_else(|| wants("a number of tokens above 0"))?);
            }
            ("budget", value) => {
                self.budget = Some(value.and_then(size).ok_or_else(|| wants("a size"))?);
            }
            ("disk", value) => {
                self.disk = Some(value.and_then(size).ok_or_else(|| wants("a size"))?);
            }
            ("spill", value) => {
                let folder = value.filter(|v| !v.is_empty());
                self.spill = Some(folder.ok_or_else(|| wants("a folder"))?.into());
            }
            _ => {
                return Err(format!(
                    "a policy has no `{key}`; it has every, ends, branches, wait, budget, spill and disk"
                ));
            }
        }
        Ok(())
    }
}

/// Tokens, at least one.
fn count(value: Option<&str>) -> Option<usize> {
    value?.parse().ok().filter(|n| *n > 0)
}

fn example(key: &str) -> &'static str {
    match key {
        "every" => "every=2048",
        "wait" => "wait=256",
        "budget" => "budget=4GiB",
        "disk" => "disk=100GB",
        _ => "spill=states",
    }
}

/// `4GiB`, `512 MB`, `1000`: bytes.
fn size(text: &str) -> Option<u64> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(unit)
}

/// The same as an option's value.
pub fn parse_size(text: &str) -> Result<u64, String> {
    size(text.trim()).ok_or_else(|| format!("{text:?} is no size; expected one such as 4GiB"))
}

fn print_size(bytes: u64) -> String {
    let units = [
        (1_u64 << 40, "TiB"),
        (1 << 30, "GiB"),
        (1 << 20, "MiB"),
        (1 << 10, "KiB"),
    ];
    let whole = units
        .iter()
        .find(|(unit, _)| bytes > 0 && bytes.is_multiple_of(*unit));
    whole.map_or(bytes.to_string(), |(unit, name)| {
        format!("{}{name}", bytes / unit)
    })
}

impl FromStr for Policy {
    type Err = BadPolicy;

    fn from_str(text: &str) -> Result<Self, BadPolicy> {
        let mut policy = Policy::default();
        let mut faults = Vec::new();
        let mut seen: Vec<&str> = Vec::new();
        for part in text
            .split([';', '\n'])
            .map(str::trim)
            .filter(|p| !p.is_empty())
        {
            let key = part.split('=').next().unwrap_or(part).trim();
            if seen.contains(&key) {
                faults.push(format!("`{key}` is given twice"));
                continue;
            }
            seen.push(key);
            faults.extend(policy.set(part).err());
        }
        if policy.disk.is_some() && policy.spill.is_none() {
            faults.push("`disk` is of no use without `spill`".into());
        }
        if faults.is_empty() {
            Ok(policy)
        } else {
            Err(BadPolicy(faults))
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [
            self.every.map(|n| format!("every={n}")),
            self.ends.then(|| "ends".into()),
            self.branches.then(|| "branches".into()),
            self.wait.map(|n| format!("wait={n}")),
            self.budget.map(|b| format!("budget={}", print_size(b))),
            self.spill
                .as_ref()
                .map(|d| format!("spill={}", d.display())),
            self.disk.map(|b| format!("disk={}", print_size(b))),
        ];
        let parts: Vec<String> = parts.into_iter().flatten().collect();
        f.write_str(&parts.join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_reads_back_as_it_prints() {
        for text in [
            "",
            "every=2048; ends; branches; wait=1; budget=4GiB",
            "every=1; spill=/tmp/a b; disk=1000001",
            "ends; budget=0",
        ] {
            let policy: Policy = text.parse().unwrap();
            assert_eq!(policy.to_string(), text);
            assert_eq!(policy.to_string().parse::<Policy>().unwrap(), policy);
        }
        assert_eq!(
            Policy::standard().to_string(),
            "every=2048; ends; branches; wait=256; budget=4GiB"
        );
        let loose: Policy = " ends ;; every = 64 ;\n budget = 17 MB ".parse().unwrap();
        assert_eq!((loose.every, loose.budget), (Some(64), Some(17_000_000)));
    }

    #[test]
    fn all_faults_of_a_policy_are_told_at_once() {
        let faults = "every=0; ends=1; wait=0; budget=4 cows; often; every=2; disk=1MB; spill="
            .parse::<Policy>()
            .unwrap_err()
            .to_string();
        for said in [
            "`every` wants a number of tokens above 0, such as `every=2048`",
            "`ends` takes no value",
            "`wait` wants a number of tokens above 0, such as `wait=256`",
            "`budget` wants a size, such as `budget=4GiB`",
            "a policy has no `often`",
            "`every` is given twice",
            "`spill` wants a folder",
            "`disk` is of no use without `spill`",
        ] {
            assert!(faults.contains(said), "{said:?} is missing from {faults}");
        }
        assert!("budget=99999999999TiB".parse::<Policy>().is_err());
        assert!("every=-1".parse::<Policy>().is_err());
    }
}
