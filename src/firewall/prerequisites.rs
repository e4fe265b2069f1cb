//! Checks that iptables can do what rfw needs, without privileges and without changing a rule.

use super::engine::START_TOOL_LIMIT;
use super::process::{Program, ToolError};
use crate::rule::net::Family;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// The time limit for an extension, which is checked for `-t` or to explain why a start failed.
const LIMIT: Duration = Duration::from_secs(5);
/// The first version with `iptables-restore -w`.
const OLDEST: &[u32] = &[1, 6, 2];

/// What `--version` prints: `iptables v1.8.9 (nf_tables)`. Before 1.8 there was only legacy.
#[derive(PartialEq, Eq, Debug)]
pub struct Version {
    numbers: Vec<u32>,
    pub is_nft: bool,
}

impl Version {
    /// The error is a sentence.
    pub fn of(iptables: &Program, family: Family, limit: Duration) -> Result<Version, String> {
        let name = if family == Family::V4 { "iptables" } else { "ip6tables" };
        let mut version = None;
        let read = iptables.read_lines(&["--version"], limit, |line| {
            version = Version::parse(line, name);
            version.is_none()
        });
        read.map_err(|error| format!("{iptables} --version failed: {error}"))?;
        version
            .ok_or_else(|| format!("{iptables} is not {name}: --version prints no version of it"))
    }

    fn parse(line: &str, name: &str) -> Option<Version> {
        let version = line.strip_prefix(name)?.split_whitespace().next()?.strip_prefix('v')?;
        let numbers: Vec<u32> = version.split('.').map_while(|word| word.parse().ok()).collect();
        let is_nft = line.contains("(nf_tables)");
        (!numbers.is_empty()).then_some(Version { numbers, is_nft })
    }

    fn is_too_old(&self) -> bool {
        self.numbers.as_slice() < OLDEST
    }
}

/// Checks the version. The error is a sentence.
pub fn check_version(iptables: &Path, family: Family) -> Result<(), String> {
    let iptables = Program::new(iptables.into(), Arc::default());
    match Version::of(&iptables, family, START_TOOL_LIMIT)?.is_too_old() {
        true => Err(format!(
            "{iptables} is too old: rfw needs version 1.6.2 or newer, with iptables-restore -w"
        )),
        false => Ok(()),
    }
}

/// Checks the extensions that rfw's rules need. The error is a sentence.
pub fn check_extensions(iptables: &Path, family: Family, sets: bool) -> Result<(), String> {
    let iptables = Program::new(iptables.into(), Arc::default());
    let (reject, icmp) = match family {
        Family::V4 => ("ipt_REJECT", "icmp-port-unreachable"),
        Family::V6 => ("ip6t_REJECT", "icmp6-port-unreachable"),
    };
    let mut extensions = vec![
        ("xt_comment", vec!["-m", "comment", "--comment", "rfw"]),
        (reject, vec!["-j", "REJECT", "--reject-with", icmp]),
    ];
    if sets {
        extensions.push(("xt_set", vec!["-m", "set"]));
    }
    for (extension, args) in extensions {
        // Without a command, iptables loads the extension and fails.
        let message = match iptables.read_lines(&args, LIMIT, |_| true) {
            Ok(()) => continue,
            Err(ToolError::Transient(sentence)) => return Err(sentence),
            Err(ToolError::Rejected(message)) => message,
        };
        if let Some(remedy) = remedy(&message, extension) {
            let message = message.split(" Try `").next().unwrap_or_default();
            return Err(format!("{iptables} cannot use {extension} ({message}); {remedy}"));
        }
    }
    Ok(())
}

/// The remedy, if the message says that an extension is missing.
fn remedy(message: &str, extension: &str) -> Option<String> {
    if message.contains("missing kernel module") {
        return Some(format!("the kernel needs the module {extension}: load, install or build it"));
    }
    // Before 1.8.8, iptables said the same about a missing kernel module.
    let is_missing = message.contains("Couldn't load") || message.contains("unknown option");
    is_missing.then(|| {
        format!(
            "install lib{extension}.so, which is part of iptables; if it is installed, the kernel \
             needs the module {extension}"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        let table = [
            ("iptables v1.8.9 (nf_tables)\n", "1.8.9 nft"),
            ("ip6tables v1.8.9 (legacy)\n", "none"),
            ("iptables v1.8.9 (legacy)\n", "1.8.9"),
            ("iptables v1.8.11 (nf_tables)", "1.8.11 nft"),
            ("iptables v1.6.2", "1.6.2"),
            ("iptables v1.4.21\n", "1.4.21 old"),
            ("iptables v1.6.1", "1.6.1 old"),
            ("iptables v1.7", "1.7"),
            ("iptables v2.0-rc1 (nf_tables)", "2 nft"),
            ("iptables", "none"),
            ("iptables version", "none"),
            ("BusyBox 1.35", "none"),
            ("", "none"),
        ];
        for (line, expected) in table {
            let shown = Version::parse(line, "iptables").map_or("none".into(), |version| {
                let numbers: Vec<_> = version.numbers.iter().map(u32::to_string).collect();
                let old = if version.is_too_old() { " old" } else { "" };
                let nft = if version.is_nft { " nft" } else { "" };
                numbers.join(".") + nft + old
            });
            assert_eq!(shown, expected, "{line}");
        }
    }

    /// Messages of iptables 1.8.9 and 1.8.7.
    #[test]
    fn remedies() {
        let table = [
            ("iptables v1.8.9 (nf_tables): no command specified", ""),
            ("iptables v1.8.9 (legacy): You must specify `--match-set' with proper arguments", ""),
            ("set: Could not determine whether revision 4 is supported, assuming it is.", ""),
            ("iptables v1.8.9 (legacy): Couldn't load match `x':No such file or directory", "lib"),
            ("iptables v1.8.7 (nf_tables): unknown option \"--reject-with\"", "lib"),
            (
                "Warning: Extension x revision 0 not supported, missing kernel module? iptables \
                 v1.8.9 (nf_tables): no command specified",
                "kernel",
            ),
        ];
        for (message, expected) in table {
            let remedy = remedy(message, "xt_x").unwrap_or_default();
            let shown = match remedy.contains("libxt_x.so") {
                true => "lib",
                false => remedy.get(4..10).unwrap_or_default(),
            };
            assert_eq!(shown, expected, "{message}: {remedy}");
        }
    }
}
