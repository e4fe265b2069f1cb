//! Counters since the start, and the rules that rfw keeps, for Prometheus (text format 0.0.4).

use crate::mutex::lock;
use crate::rule::tag::Tag;
use crate::rule::{Chain, Filter, Target};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// A counter or gauge. It has the width of a machine word, because mips has no wider atomics. The
/// numbers are independent of each other, so no memory ordering is needed.
#[derive(Default)]
pub struct Number(AtomicUsize);

impl Number {
    pub fn add(&self, count: usize) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    pub fn decrement(&self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.load(Ordering::Relaxed).fmt(f)
    }
}

/// How rules are grouped for counting.
pub type Label = (Chain, Target, Tag);

/// The rules of a label, and the packets and bytes that they have matched.
#[derive(Clone, Copy, Default)]
pub struct Usage {
    pub rules: usize,
    pub packets: u64,
    pub bytes: u64,
}

#[derive(Default)]
pub struct Metrics {
    /// As of the last check of the kernel.
    usage: Mutex<BTreeMap<Label, Usage>>,
    /// When the first certificate of the outward server's chain expires, as Unix time.
    pub certificate_expires: Option<Duration>,
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
    pub fn set_usage(&self, usage: BTreeMap<Label, Usage>) {
        *lock(&self.usage) = usage;
    }

    pub fn rules_in(&self, filter: &Filter) -> usize {
        let usage = lock(&self.usage);
        let counted = usage.iter().filter(|((chain, _, tag), _)| filter.covers(*chain, *tag));
        counted.fold(0, |sum, (_, usage)| sum.saturating_add(usage.rules))
    }

    /// All metrics, each with its help and type.
    pub fn text(&self) -> String {
        let mut text = String::new();
        let mut family = |name: &str, kind: &str, help: &str, samples: &str| {
            text += &format!("# HELP rfw_{name} {help}\n# TYPE rfw_{name} {kind}\n");
            for sample in samples.lines() {
                text += &format!("rfw_{name}{sample}\n");
            }
        };
        let version = env!("CARGO_PKG_VERSION");
        family("build_info", "gauge", "The version.", &format!("{{version=\"{version}\"}} 1"));
        let usage = lock(&self.usage).clone();
        let samples = |value: fn(&Usage) -> u64| {
            let sample = |((chain, target, tag), usage): (&Label, &Usage)| {
                let (chain, target, tag) = (chain.name(), target.name(), tag.name());
                let value = value(usage);
                format!("{{chain=\"{chain}\",target=\"{target}\",tag=\"{tag}\"}} {value}\n")
            };
            usage.iter().map(sample).collect::<String>()
        };
        let rules = samples(|usage| usage.rules as u64);
        family("rules", "gauge", "Rules that rfw keeps, including addresses in sets.", &rules);
        let (packets, bytes) = (samples(|usage| usage.packets), samples(|usage| usage.bytes));
        family("packets_total", "counter", "Packets that rules have matched.", &packets);
        family("bytes_total", "counter", "Bytes that rules have matched.", &bytes);
        let open = format!(" {}", self.open_connections);
        family("connections", "gauge", "Open connections.", &open);
        if let Some(time) = self.certificate_expires {
            let help = "When the server's certificate expires.";
            let time = format!(" {}", time.as_secs());
            family("certificate_expires_timestamp_seconds", "gauge", help, &time);
        }
        let counters = [
            ("batches", "Batches of changes.", &self.batches),
            ("kernel_failures", "Changes and checks that failed.", &self.kernel_failures),
            ("restored_rules", "Missing rules that were restored.", &self.restored),
            ("overtaken", "How often foreign rules were found before rfw's.", &self.overtaken),
            ("expired_rules", "Rules deleted at their expiry.", &self.expired),
            ("refused_logins", "Requests with wrong or missing credentials.", &self.refused_logins),
            ("accepted_connections", "Connections that got a slot.", &self.connections),
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
        let certificate_expires = Some(Duration::from_secs(4_107_542_400));
        let metrics = Metrics { certificate_expires, ..Metrics::default() };
        let usage = |rules| Usage { rules, packets: 5, bytes: 300 };
        let feed = Tag::parse("feed").unwrap();
        metrics.set_usage(BTreeMap::from([
            ((Chain::Forward, Target::Accept, Tag::NONE), usage(7)),
            ((Chain::Input, Target::Drop, feed), usage(2)),
        ]));
        let table = [
            (None, None, 9),
            (Some(Chain::Input), None, 2),
            (None, Some(Tag::NONE), 7),
            (Some(Chain::Output), None, 0),
        ];
        for (chain, tag, count) in table {
            assert_eq!(
                metrics.rules_in(&Filter { chain, tag, net: None }),
                count,
                "{chain:?} {tag:?}"
            );
        }
        metrics.expired.add(3);
        metrics.open_connections.add(2);
        metrics.open_connections.decrement();
        let text = metrics.text();
        for line in [
            "# HELP rfw_rules Rules that rfw keeps, including addresses in sets.",
            "# TYPE rfw_rules gauge",
            "rfw_rules{chain=\"FORWARD\",target=\"ACCEPT\",tag=\"\"} 7",
            "rfw_rules{chain=\"INPUT\",target=\"DROP\",tag=\"feed\"} 2",
            "rfw_packets_total{chain=\"INPUT\",target=\"DROP\",tag=\"feed\"} 5",
            "rfw_bytes_total{chain=\"INPUT\",target=\"DROP\",tag=\"feed\"} 300",
            "# TYPE rfw_expired_rules_total counter",
            "rfw_expired_rules_total 3",
            "rfw_connections 1",
            "rfw_certificate_expires_timestamp_seconds 4107542400",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    }
}
