//! Rules that rfw 0.2.2, or rfw with the other variant of iptables, left in the kernel. They are
//! reported at start and never touched.

use super::iptables::{Iptables, KernelRule, RuleEdit, RuleKind, TaggedRule, parse_row};
use super::prerequisites::Version;
use super::process::Program;
use crate::log::Log;
use crate::rule::net::Family;
use crate::rule::{Chain, Iface, Target};
use std::time::Duration;
use std::{fmt, fs};

const LIMIT: Duration = Duration::from_secs(5);
const COMMENT: &str = " -m comment --comment rfw";

/// Parses a rule of rfw 0.2.2: for any interface, and without a comment.
fn old_rule(line: &str) -> Option<TaggedRule> {
    let guard = if line.contains(" -p tcp ") { ":guard" } else { "" };
    let with_comment = line.replacen(" -j ", &format!("{COMMENT}{guard} -j "), 1);
    let KernelRule { rule, kind } = parse_row(&with_comment, Family::V4)?.1?.rule;
    let is_old = rule.ifaces() == (Iface::ANY, Iface::ANY)
        && (kind != RuleKind::Plain || rule.addresses().next().is_some());
    is_old.then_some(TaggedRule::new(KernelRule { rule, kind }, None))
}

/// Warns of leftovers. If they cannot be listed, they are not reported.
pub fn report(iptables: &Iptables, log: &Log) {
    // 0.2.2 supported only IPv4.
    if iptables.family == Family::V4 {
        let mut old = Vec::new();
        let _ = iptables.read(LIMIT, |_, tagged, line| {
            old.extend(if tagged.is_none() { old_rule(line) } else { None });
        });
        if let Some(sentence) = warning(old, &iptables.iptables) {
            log.warning(format_args!("{sentence}"));
        }
    }
    report_other_variant(iptables, log);
}

/// An administrator's own rules may look the same, above all those that accept an address. These
/// are reported only together with a guard rule of 0.2.2, so the guards must be removed last.
fn warning(mut old: Vec<TaggedRule>, iptables: impl fmt::Display) -> Option<String> {
    let port = old.iter().find_map(guarded_port);
    old.retain(|TaggedRule { rule, .. }| {
        rule.kind == RuleKind::Plain && (port.is_some() || rule.rule.target != Target::Accept)
    });
    // The last, because a rule that is adopted moves to the front.
    if let Some(last) = old.last() {
        let delete = RuleEdit::Delete(*last).to_string().replace(COMMENT, "");
        return Some(format!(
            "rules that rfw 0.2.2 may have left: {}; rfw does not list, expire or delete them; \
             rfw(8), REPLACING RFW 0.2.2, shows the commands that adopt or remove all; for the \
             last one, run rfwc put '{}?expire=0' && {iptables} {delete} to adopt it, or only the \
             latter to remove it",
            old.len(),
            last.rule
        ));
    }
    port.map(|port| {
        format!(
            "rfw 0.2.2 left guard rules for port {port}; to remove them, run {iptables} -S | sed -nE \
             '/^-A (INPUT( -s [^ ]+)? -p tcp -m tcp --d|OUTPUT( -d [^ ]+)? -p tcp -m tcp --s)port \
             {port} -j (ACCEPT|DROP)$/s|^-A|{iptables} -D|p' | sh"
        )
    })
}

/// The port of a rule that drops all responses from it: hardly any program but 0.2.2 makes one.
fn guarded_port(tagged: &TaggedRule) -> Option<u16> {
    let KernelRule { rule, kind: RuleKind::Guard(port) } = tagged.rule else { return None };
    let drops = (rule.chain(), rule.target) == (Chain::Output, Target::Drop);
    Some(port).filter(|_| drops && rule.addresses().next().is_none())
}

/// Warns of rfw's rules in the other variant of iptables, which the kernel applies, too. The command
/// ends in a shell, so it leaves out every line with a character that rfw's rules do not contain:
/// foreign comments and interfaces may have any.
fn report_other_variant(iptables: &Iptables, log: &Log) {
    let Some(other) = other_variant(iptables) else { return };
    let mut count = 0_usize;
    let _ = other.read(LIMIT, |_, tagged, _| {
        count = count.saturating_add(usize::from(tagged.is_some()));
    });
    if count > 0 {
        let (used, other) = (&iptables.iptables, &other.iptables);
        log.warning(format_args!(
            "rules of rfw in {other}: {count}; they are in effect together with those in {used}, but \
             rfw does not list, expire or delete them; to remove them, run {other} -S | sed -nE \
             '/[^-+A-Za-z0-9 .:@_~\"/]/d; /^[^\"]*--comment \"?rfw([:@][^ ]*|\"?) -j/s|^-A|{other} \
             -D|p' | sh"
        ));
    }
}

/// The other variant's program in the same directory. If the legacy tables do not exist, it is not
/// run, because listing them would create them.
fn other_variant(iptables: &Iptables) -> Option<Iptables> {
    let (name, tables) = match iptables.family {
        Family::V4 => ("iptables", "/proc/net/ip_tables_names"),
        Family::V6 => ("ip6tables", "/proc/net/ip6_tables_names"),
    };
    let is_nft = Version::of(&iptables.iptables, iptables.family, LIMIT).ok()?.is_nft;
    if is_nft && !fs::read_to_string(tables).ok()?.lines().any(|table| table == "filter") {
        return None;
    }
    let variant = if is_nft { "legacy" } else { "nft" };
    let Program { path, programs } = &iptables.iptables;
    let path = path.with_file_name(format!("{name}-{variant}"));
    path.exists().then(|| Iptables::new(iptables.family, path, programs.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms() {
        let table = [
            // As 0.2.2 leaves them, with iptables 1.8.9
            ("-A INPUT -s 7.7.7.0/24 -c 0 0 -j DROP", "/drop/input/any/7.7.7.0/24"),
            ("-A OUTPUT -d 9.9.9.9/32 -c 5 7 -j ACCEPT", "/accept/output/any/9.9.9.9"),
            (
                "-A FORWARD -s 1.2.3.0/24 -d 5.5.5.5/32 -c 0 0 -j REJECT --reject-with icmp-port-unreachable",
                "/reject/forward/any/1.2.3.0/24/any/5.5.5.5",
            ),
            (
                "-A INPUT -s 192.0.2.1/32 -p tcp -m tcp --dport 7393 -c 0 0 -j ACCEPT",
                "guard rule for port 7393 (INPUT, ACCEPT 192.0.2.1)",
            ),
            (
                "-A OUTPUT -p tcp -m tcp --sport 7393 -c 0 0 -j DROP",
                "guard rule for port 7393 (OUTPUT, DROP)",
            ),
            // Which 0.2.2 never makes
            ("-A INPUT -s 7.7.7.7/32 -i eth0 -c 0 0 -j DROP", ""),
            ("-A INPUT ! -s 7.7.7.7/32 -c 0 0 -j DROP", ""),
            ("-A INPUT -s 7.0.0.0/8 -c 0 0 -j DROP", ""),
            ("-A INPUT -c 0 0 -j DROP", ""),
            ("-A FORWARD -c 0 0 -j DROP", ""),
            ("-A FORWARD -s 0.0.0.0/32 -c 0 0 -j DROP", ""),
            ("-A INPUT -s 7.7.7.7/32 -c 0 0 -j LOG", ""),
            ("-A INPUT -s 7.7.7.7/32 -m comment --comment mine -c 0 0 -j DROP", ""),
            ("-A INPUT -p udp -m udp --dport 7393 -c 0 0 -j DROP", ""),
            ("-A OUTPUT -p tcp -m tcp --dport 7393 -c 0 0 -j DROP", ""),
            ("-A INPUT -s 7.7.7.7/32 -p tcp -c 0 0 -j DROP", ""),
            ("-A INPUT -j f2b-sshd", ""),
        ];
        for (line, expected) in table {
            let rule = old_rule(line).map_or(String::new(), |tagged| tagged.rule.to_string());
            assert_eq!(rule, expected, "{line}");
        }
    }

    #[test]
    fn warnings() {
        let table: [(&[&str], &str); 7] = [
            (&[], ""),
            (&["-A INPUT -s 7.7.7.7/32 -j ACCEPT"], ""),
            (&["-A OUTPUT -d 10.0.0.1/32 -p tcp -m tcp --sport 80 -j DROP"], ""),
            (&["-A INPUT -p tcp -m tcp --dport 80 -j DROP"], ""),
            (
                &["-A INPUT -s 7.7.7.7/32 -j ACCEPT", "-A INPUT -s 8.8.8.8/32 -j DROP"],
                "; for the last one, run rfwc put '/drop/input/any/8.8.8.8?expire=0' && /ipt -D \
                 INPUT -s 8.8.8.8 -j DROP to adopt it, or only the latter to remove it",
            ),
            (
                &["-A INPUT -s 7.7.7.7/32 -j ACCEPT", "-A OUTPUT -p tcp -m tcp --sport 80 -j DROP"],
                "; for the last one, run rfwc put '/accept/input/any/7.7.7.7?expire=0' && /ipt -D \
                 INPUT -s 7.7.7.7 -j ACCEPT to adopt it, or only the latter to remove it",
            ),
            (
                &["-A OUTPUT -p tcp -m tcp --sport 80 -j DROP"],
                "rfw 0.2.2 left guard rules for port 80; to remove them, run /ipt -S | sed -nE '/^-A \
                 (INPUT( -s [^ ]+)? -p tcp -m tcp --d|OUTPUT( -d [^ ]+)? -p tcp -m tcp --s)port 80 \
                 -j (ACCEPT|DROP)$/s|^-A|/ipt -D|p' | sh",
            ),
        ];
        for (lines, expected) in table {
            let old = lines.iter().filter_map(|line| old_rule(line)).collect();
            let found = warning(old, "/ipt").unwrap_or_default();
            let head = "rules that rfw 0.2.2 may have left: 1; rfw does not list, expire or delete \
                        them; rfw(8), REPLACING RFW 0.2.2, shows the commands that adopt or remove all";
            assert_eq!(found.strip_prefix(head).unwrap_or(&found), expected, "{lines:?}");
        }
    }
}
