//! What rfw has done since it started and what it keeps, for Prometheus (text format 0.0.4).

use crate::rule::{Chain, Target};
use std::fmt::{self, Write};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Goes up, or says how many there are now; as wide as the processor's words, because
/// mips knows no wider atomics. Each stands for itself, so nothing need be ordered.
#[derive(Default)]
pub struct Number(AtomicUsize);

impl Number {
    pub fn add(&self, count: usize) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    pub fn less_one(&self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }

    pub fn get(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    pub fn set(&self, count: usize) {
        self.0.store(count, Ordering::Relaxed);
    }
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.get().fmt(f)
    }
}

#[derive(Default)]
pub struct Metrics {
    /// By chain and target, as of the last look at the kernel.
    pub rules: [[Number; Target::ALL.len()]; Chain::ALL.len()],
    pub batches: Number,
    pub kernel_failures: Number,
    pub restored: Number,
    pub overtaken: Number,
    pub expired: Number,
    pub refused_logins: Number,
    pub connections: Number,
    pub open_connections: Number,
}

impl Metrics {
    /// How many rules rfw keeps in a chain, or in all.
    pub fn rules_in(&self, chain: Option<Chain>) -> usize {
        let rows = Chain::ALL.iter().zip(&self.rules);
        let wanted = rows.filter(|(known, _)| chain.is_none_or(|chain| chain == **known));
        wanted.flat_map(|(_, row)| row).fold(0, |sum, number| sum.saturating_add(number.get()))
    }

    /// All of them, each with its help and type.
    pub fn text(&self) -> String {
        let mut text = String::new();
        let mut family = |name: &str, kind: &str, help: &str, samples: &str| {
            // A String takes everything.
            let _ = writeln!(text, "# HELP rfw_{name} {help}\n# TYPE rfw_{name} {kind}");
            for sample in samples.lines() {
                let _ = writeln!(text, "rfw_{name}{sample}");
            }
        };
        let version = env!("CARGO_PKG_VERSION");
        family("build_info", "gauge", "The version.", &format!("{{version=\"{version}\"}} 1"));
        let mut rules = String::new();
        for (chain, targets) in Chain::ALL.iter().zip(&self.rules) {
            for (target, count) in Target::ALL.iter().zip(targets) {
                let (chain, target) = (chain.name(), target.name());
                let _ = writeln!(rules, "{{chain=\"{chain}\",target=\"{target}\"}} {count}");
            }
        }
        family("rules", "gauge", "Rules that rfw keeps, addresses in sets included.", &rules);
        let open = format!(" {}", self.open_connections);
        family("connections", "gauge", "Connections that are served now.", &open);
        let counters = [
            ("batches", "Batches of changes that were carried out.", &self.batches),
            ("kernel_failures", "Changes and looks that failed.", &self.kernel_failures),
            ("restored_rules", "Rules put back that others had removed.", &self.restored),
            ("overtaken", "Times that others' rules were found before rfw's.", &self.overtaken),
            ("expired_rules", "Rules deleted at their expiry.", &self.expired),
            ("refused_logins", "Requests with credentials wrong or missing.", &self.refused_logins),
            ("accepted_connections", "Connections that found a place.", &self.connections),
        ];
        for (name, help, number) in counters {
            family(&format!("{name}_total"), "counter", help, &format!(" {number}"));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text() {
        let metrics = Metrics::default();
        metrics.rules[Chain::Forward as usize][Target::Accept as usize].set(7);
        metrics.rules[Chain::Input as usize][Target::Drop as usize].set(5);
        for (chain, count) in [(None, 12), (Some(Chain::Input), 5), (Some(Chain::Output), 0)] {
            assert_eq!(metrics.rules_in(chain), count, "{chain:?}");
        }
        metrics.expired.add(3);
        metrics.open_connections.add(2);
        metrics.open_connections.less_one();
        let text = metrics.text();
        for line in [
            "# HELP rfw_rules Rules that rfw keeps, addresses in sets included.",
            "# TYPE rfw_rules gauge",
            "rfw_rules{chain=\"FORWARD\",target=\"ACCEPT\"} 7",
            "rfw_rules{chain=\"INPUT\",target=\"DROP\"} 5",
            "rfw_rules{chain=\"OUTPUT\",target=\"DROP\"} 0",
            "# TYPE rfw_expired_rules_total counter",
            "rfw_expired_rules_total 3",
            "rfw_connections 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    }
}
