//! What rfw owns, as the kernel's tools write and read it, and those tools.
//!
//! Every rule of rfw's carries a comment, its [`Tag`]; a rule without one, or
//! of a shape that rfw does not make, is somebody else's and stays untouched.

use super::exec::{self, Failure, Presence};
use crate::rule::net::{Family, Net};
use crate::rule::{Chain, Iface, Rule, Scope, Target};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// How long one command may take, how much more a batch gets for each line,
/// and how long the listing at start may take, when nobody waits yet.
pub const LIMIT: Duration = Duration::from_secs(10);
const PER_LINE: Duration = Duration::from_millis(10);
pub const START_LIMIT: Duration = Duration::from_secs(60);
/// Seconds that the tools wait for the xtables lock.
const LOCK_WAIT: &str = "5";

/// Whose a rule is and until when, kept in its comment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Tag {
    /// `rfw`
    Permanent,
    /// `rfw:UNIXSECONDS`
    Until(u64),
    /// `rfw:guard`, for this TCP port of rfw's own.
    Guard(u16),
}

impl Tag {
    /// When the rule expires.
    pub fn expires(self) -> Option<u64> {
        if let Tag::Until(second) = self { Some(second) } else { None }
    }

    pub fn is_guard(self) -> bool {
        matches!(self, Tag::Guard(_))
    }

    /// Reads a comment; `port` is the one that the rule names.
    fn parse(comment: &str, port: Option<u16>) -> Option<Tag> {
        match (comment.strip_prefix("rfw")?, port) {
            ("", None) => Some(Tag::Permanent),
            (":guard", Some(port)) => Some(Tag::Guard(port)),
            (second, None) => {
                let tag = Tag::Until(second.strip_prefix(':')?.parse().ok()?);
                Some(tag).filter(|tag| tag.to_string() == comment)
            }
            _ => None,
        }
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Tag::Permanent => f.write_str("rfw"),
            Tag::Until(second) => write!(f, "rfw:{second}"),
            Tag::Guard(_) => f.write_str("rfw:guard"),
        }
    }
}

/// A rule as it stands in the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Owned {
    pub rule: Rule,
    pub tag: Tag,
    /// Packets and bytes that it has met.
    pub counters: (u64, u64),
}

impl Owned {
    /// A rule that has met no packet yet.
    pub fn new(rule: Rule, tag: Tag) -> Owned {
        Owned { rule, tag, counters: (0, 0) }
    }

    pub fn delete_line(&self) -> String {
        format!("-D {} {}", self.rule.chain().name(), self.spec())
    }

    /// Inserts it as the chain's rule number `place`; 1 is the front.
    pub fn insert_line(&self, place: usize) -> String {
        let place = if place == 1 { String::new() } else { format!(" {place}") };
        let counters = match self.counters {
            (0, 0) => String::new(),
            (packets, bytes) => format!(" -c {packets} {bytes}"),
        };
        format!("-I {}{place} {}{counters}", self.rule.chain().name(), self.spec())
    }

    /// What follows the chain. No word of it holds a space or a quote: names,
    /// numbers and addresses alone can get here.
    fn spec(&self) -> String {
        let ((inp, out), (source, destination)) = (self.rule.ifaces(), self.rule.ends());
        let iface = |option, iface| match iface {
            Iface::ANY => String::new(),
            _ => format!("{option} {iface} "),
        };
        let net = |option, net: Net| match net.is_any() {
            true => String::new(),
            false => format!("{option} {net} "),
        };
        let port = match (self.tag, self.rule.chain()) {
            (Tag::Guard(port), Chain::Output) => format!("-p tcp -m tcp --sport {port} "),
            (Tag::Guard(port), _) => format!("-p tcp -m tcp --dport {port} "),
            _ => String::new(),
        };
        format!(
            "{}{}{}{}{port}-m comment --comment {} -j {}",
            iface("-i", inp),
            iface("-o", out),
            net("-s", source),
            net("-d", destination),
            self.tag,
            self.rule.target.name()
        )
    }
}

/// One rule of a listing: one of rfw's, or anybody else's.
pub type Row = Option<Owned>;

/// Reads a line of `iptables -v -S`; `None` if it is no rule of a built-in
/// chain. The order of the options varies with the version.
pub fn parse_row(line: &str, family: Family) -> Option<(Chain, Row)> {
    let (chain, spec) = line.trim_end().strip_prefix("-A ")?.split_once(' ')?;
    let chain = Chain::ALL.into_iter().find(|known| known.name() == chain)?;
    let ours = spec.contains("rfw").then(|| parse_owned(chain, spec, family));
    Some((chain, ours.flatten()))
}

/// `None` where an option is left over that no rule of rfw's has.
fn parse_owned(chain: Chain, spec: &str, family: Family) -> Option<Owned> {
    let mut words = spec.split(' ');
    let (mut options, mut matches) = (Vec::new(), Vec::new());
    let mut counters = (0, 0);
    while let Some(option) = words.next() {
        let value = words.next()?;
        match (option, value) {
            ("-c", packets) => counters = (packets.parse().ok()?, words.next()?.parse().ok()?),
            ("-m", name) => matches.push(name),
            ("--reject-with", "icmp-port-unreachable" | "icmp6-port-unreachable") => {}
            _ => options.push((option, value)),
        }
    }
    let mut take = |name: &str| {
        let at = options.iter().position(|(option, _)| *option == name)?;
        Some(options.swap_remove(at).1)
    };
    let port = match (take("-p"), chain) {
        (None, _) => None,
        (Some("tcp"), Chain::Input) => Some(take("--dport")?.parse().ok()?),
        (Some("tcp"), Chain::Output) => Some(take("--sport")?.parse().ok()?),
        _ => return None,
    };
    // In another order our own line would not find the rule again.
    let expected: &[&str] = if port.is_some() { &["tcp", "comment"] } else { &["comment"] };
    if matches != expected {
        return None;
    }
    let tag = Tag::parse(take("--comment")?.trim_matches('"'), port)?;
    let target = take("-j")?;
    let target = Target::ALL.into_iter().find(|known| known.name() == target)?;
    let same = |name: &str| {
        Iface::parse(name).filter(|iface| *iface != Iface::ANY && iface.to_string() == name)
    };
    let mut iface = |option| take(option).map_or(Some(Iface::ANY), same);
    let (inp, out) = (iface("-i")?, iface("-o")?);
    let mut net = |option| take(option).map_or(Some(Net::any(family)), Net::parse);
    let (source, destination) = (net("-s")?, net("-d")?);
    let scope = match (chain, (inp, source.is_any()), (out, destination.is_any())) {
        (Chain::Forward, ..) => Scope::Forward { inp, out, source, destination },
        (Chain::Input, _, (Iface::ANY, true)) => Scope::Input { iface: inp, source },
        (Chain::Output, (Iface::ANY, true), _) => Scope::Output { iface: out, destination },
        _ => return None,
    };
    let rule = Rule { target, scope };
    let ours = options.is_empty() && (port.is_some() || rule.is_wellformed());
    ours.then_some(Owned { rule, tag, counters })
}

/// The programs of one family: `iptables`, and `iptables-restore` beside it.
#[derive(Clone)]
pub struct Tools {
    pub family: Family,
    iptables: PathBuf,
    restore: PathBuf,
    presence: Arc<Presence>,
}

/// `/sbin/iptables-nft` has `/sbin/iptables-nft-restore` beside it.
pub fn restore_beside(iptables: &Path) -> PathBuf {
    let mut restore = iptables.as_os_str().to_owned();
    restore.push("-restore");
    restore.into()
}

impl Tools {
    /// `iptables` is an absolute path.
    pub fn new(family: Family, iptables: PathBuf, presence: Arc<Presence>) -> Tools {
        Tools { family, restore: restore_beside(&iptables), iptables, presence }
    }

    /// Commits lines such as `-I INPUT …` in order, all or none: one alone as
    /// that very command, several in one transaction.
    pub fn commit(&self, lines: &[String]) -> Result<(), Failure> {
        if let [line] = lines {
            let args: Vec<&str> = ["-w", LOCK_WAIT].into_iter().chain(line.split(' ')).collect();
            return exec::run(&self.presence, &self.iptables, &args, "", LIMIT);
        }
        if lines.is_empty() {
            return Ok(());
        }
        let input = format!("*filter\n{}\nCOMMIT\n", lines.join("\n"));
        let count = u32::try_from(lines.len()).unwrap_or(u32::MAX);
        let limit = LIMIT.saturating_add(PER_LINE.saturating_mul(count));
        let args = ["--noflush", "-w", LOCK_WAIT];
        exec::run(&self.presence, &self.restore, &args, &input, limit)
    }

    /// Reads every rule of the built-in chains, or of one, until `each` says
    /// `false`; the counters take a tenth longer.
    pub fn list(
        &self,
        chain: Option<Chain>,
        counters: bool,
        limit: Duration,
        mut each: impl FnMut(Chain, Row) -> bool,
    ) -> Result<(), Failure> {
        let mut args = vec!["-w", LOCK_WAIT];
        args.extend(counters.then_some("-v"));
        args.push("-S");
        args.extend(chain.map(Chain::name));
        exec::lines(&self.iptables, &args, limit, |line| match parse_row(line, self.family) {
            Some((chain, row)) => each(chain, row),
            None => true,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> String {
        let family = if line.contains("::") { Family::V6 } else { Family::V4 };
        match parse_row(line, family) {
            None => "none".into(),
            Some((_, None)) => "foreign".into(),
            Some((_, Some(o))) => format!("{} {} {:?}", o.rule, o.tag, o.counters),
        }
    }

    #[test]
    fn listings_of_several_versions() {
        let table = [
            // iptables-nft and iptables-legacy 1.8.9, with -v and without
            (
                r#"-A INPUT -s 1.1.1.1/32 -m comment --comment "rfw:17" -c 5 7 -j DROP"#,
                "/drop/input/any/1.1.1.1 rfw:17 (5, 7)",
            ),
            (
                "-A INPUT -s 2.2.2.0/24 -i ppp+ -m comment --comment rfw -c 0 0 -j REJECT --reject-with icmp-port-unreachable",
                "/reject/input/ppp+/2.2.2.0/24 rfw (0, 0)",
            ),
            (
                "-A OUTPUT -d 2001:db8::/64 -o eth0 -m comment --comment rfw -j REJECT --reject-with icmp6-port-unreachable\n",
                "/reject/output/eth0/2001:db8::/64 rfw (0, 0)",
            ),
            ("-A FORWARD -m comment --comment rfw -j DROP", "/drop/forward/any/0.0.0.0 rfw (0, 0)"),
            (
                "-A FORWARD -s 1.1.1.1/32 -d 2.2.2.2/32 -i a+ -o b1 -m comment --comment rfw -j ACCEPT",
                "/accept/forward/a+/1.1.1.1/b1/2.2.2.2 rfw (0, 0)",
            ),
            (
                r#"-A INPUT -s 9.9.9.9/32 -p tcp -m tcp --dport 7393 -m comment --comment "rfw:guard" -j ACCEPT"#,
                "/accept/input/any/9.9.9.9 rfw:guard (0, 0)",
            ),
            (
                r#"-A OUTPUT -p tcp -m tcp --sport 7393 -m comment --comment "rfw:guard" -j DROP"#,
                "/drop/output/any/0.0.0.0 rfw:guard (0, 0)",
            ),
            // Other orders, as versions before 1.4 and after 1.8.10 have them
            (
                r#"-A INPUT -m comment --comment "rfw:17" -s 1.1.1.1/32 -j DROP -c 1 2"#,
                "/drop/input/any/1.1.1.1 rfw:17 (1, 2)",
            ),
            (
                "-A INPUT -i eth0 -s 1.1.1.1 -j DROP -m comment --comment rfw",
                "/drop/input/eth0/1.1.1.1 rfw (0, 0)",
            ),
        ];
        for (line, expected) in table {
            assert_eq!(read(line), expected, "{line}");
        }
    }

    #[test]
    fn what_others_have_made_is_theirs() {
        let own = "-A INPUT -s 1.1.1.1/32 -m comment --comment rfw -j DROP";
        assert_ne!(read(own), "foreign");
        let foreign = [
            "-A INPUT -s 1.1.1.1/32 -j DROP",
            "-A INPUT -s 1.1.1.1/32 -m comment --comment rfw",
            "-A INPUT -s 1.1.1.1/32 -m comment --comment rfw -j LOG",
            "-A INPUT -s 1.1.1.1/32 -m comment --comment rfw -g DROP",
            "-A INPUT ! -s 1.1.1.1/32 -m comment --comment rfw -j DROP",
            "-A INPUT -s 1.1.1.1/32 -s 1.1.1.2/32 -m comment --comment rfw -j DROP",
            "-A INPUT -s 1.1.1.1/32 -d 2.2.2.2/32 -m comment --comment rfw -j DROP",
            "-A INPUT -s 1.1.1.1/32 -o eth0 -m comment --comment rfw -j DROP",
            "-A INPUT -s 1.0.0.0/8 -m comment --comment rfw -j DROP",
            "-A INPUT -s 0.0.0.0/32 -m comment --comment rfw -j DROP",
            "-A INPUT -m comment --comment rfw -j DROP",
            r#"-A INPUT -p tcp -m comment --comment "rfw:guard" -m tcp --dport 99 -j ACCEPT"#,
            "-A INPUT -s 1.1.1.1/32 -m tcp -m comment --comment rfw -j DROP",
            "-A INPUT -s 1.1.1.1/32 -i any -m comment --comment rfw -j DROP",
            "-A INPUT -s 1.1.1.1/32 -i lo -m comment --comment rfw -j DROP",
            "-A INPUT -s 1.1.1.1/32 -p tcp -m tcp --dport 22 -m comment --comment rfw -j DROP",
            "-A INPUT -s 1.1.1.1/32 -p udp --dport 22 -m comment --comment rfw:guard -j DROP",
            "-A INPUT -s 1.1.1.1/32 -m comment --comment rfw:guard -j DROP",
            "-A INPUT -s 1.1.1.1/32 -m comment --comment rfw:017 -j DROP",
            "-A INPUT -s 1.1.1.1/32 -m comment --comment rfw:-1 -j DROP",
            "-A INPUT -s 1.1.1.1/32 -m comment --comment rfw2 -j DROP",
            r#"-A INPUT -s 1.1.1.1/32 -m comment --comment "rfw x" -j DROP"#,
            r#"-A INPUT -s 1.1.1.1/32 -m comment --comment "\"rfw\"" -j DROP"#,
            "-A INPUT -s 1.1.1.1/32 -m comment --comment rfw -j REJECT --reject-with tcp-reset",
            r#"-A INPUT -j LOG --log-prefix "rfw -j DROP ""#,
        ];
        for line in foreign {
            assert_eq!(read(line), "foreign", "{line}");
        }
        for line in ["-P INPUT ACCEPT -c 0 0", "-N rfw", "-A rfw -j DROP", "# -A INPUT", ""] {
            assert_eq!(read(line), "none", "{line}");
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let rules = [
            (
                "/drop/input/eth0/1.2.3.4",
                "-D INPUT -i eth0 -s 1.2.3.4 -m comment --comment rfw -j DROP",
            ),
            (
                "/reject/output/any/2001:db8::/64",
                "-D OUTPUT -d 2001:db8::/64 -m comment --comment rfw -j REJECT",
            ),
            (
                "/accept/forward/a/1.2.3.4/b1/5.6.7.0/24",
                "-D FORWARD -i a+ -o b1 -s 1.2.3.4 -d 5.6.7.0/24 -m comment --comment rfw -j ACCEPT",
            ),
        ];
        for (path, line) in rules {
            let owned = Owned::new(path.parse().unwrap(), Tag::Permanent);
            assert_eq!(owned.delete_line(), line);
            let family = owned.rule.family();
            let listed = owned.insert_line(1).replace("-I ", "-A ");
            assert_eq!(parse_row(&listed, family), Some((owned.rule.chain(), Some(owned))));
        }
        let mut owned = Owned::new("/drop/input/any/1.2.3.4".parse().unwrap(), Tag::Until(9));
        owned.counters = (5, 7);
        let line = "-I INPUT 3 -s 1.2.3.4 -m comment --comment rfw:9 -j DROP -c 5 7";
        assert_eq!(owned.insert_line(3), line);
    }
}
