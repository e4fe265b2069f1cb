//! What rfw owns, as the kernel's tools write and read it, and those tools.
//!
//! Every rule of rfw's carries a comment: `rfw`, `rfw:UNIXSECONDS` where it
//! expires, `rfw:guard` for rfw's own port. A rule without one, or of a shape that
//! rfw does not make, is somebody else's and stays untouched.

use super::exec::{self, Failure, Presence};
use super::ipset::set_name;
use crate::rule::net::{Family, Net};
use crate::rule::{Chain, End, Iface, Place, Rule, Scope, Target, is_number};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// How long one command may take, how much more a batch gets for each line,
/// and how long the listing at start may take, when nobody waits yet.
pub const LIMIT: Duration = Duration::from_secs(10);
const PER_LINE: Duration = Duration::from_millis(10);
const LONGEST_LIMIT: Duration = Duration::from_secs(600);
pub const START_LIMIT: Duration = Duration::from_secs(60);
/// The most rules of all that a family may have: a listing that does not end must
/// not take all memory.
const MAX_LISTED: usize = 300_000;
/// Seconds that the tools wait for the xtables lock.
const LOCK_WAIT: &str = "5";

/// What else is in one of rfw's rules.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Kind {
    Plain,
    /// Only this TCP port, rfw's own.
    Guard(u16),
    /// Only the addresses of its place's set. The rule is for any address.
    Set(End),
}

/// A rule as the kernel knows it, whenever it expires.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Line {
    pub rule: Rule,
    pub kind: Kind,
}

impl Line {
    pub fn plain(rule: Rule) -> Line {
        Line { rule, kind: Kind::Plain }
    }

    /// The rule for the set of a place.
    pub fn set(place: Place, family: Family) -> Line {
        Line { rule: place.rule(Net::any(family)), kind: Kind::Set(place.end) }
    }

    /// The place of a set's rule.
    pub fn place(&self) -> Option<Place> {
        let Kind::Set(end) = self.kind else { return None };
        let (inp, out) = self.rule.ifaces();
        Some(Place { target: self.rule.target, chain: self.rule.chain(), inp, out, end })
    }

    pub fn is_guard(&self) -> bool {
        matches!(self.kind, Kind::Guard(_))
    }
}

/// For the log: a path, or the name of a set.
impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.place() {
            Some(place) => f.write_str(&set_name(&place, self.rule.family())),
            None => self.rule.fmt(f),
        }
    }
}

/// A rule as it stands in the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Owned {
    pub line: Line,
    /// Unix seconds, kept in the comment; only plain rules expire.
    pub expires: Option<u64>,
    /// Packets and bytes that it has met.
    pub counters: (u64, u64),
}

impl Owned {
    /// A rule that has met no packet yet.
    pub fn new(line: Line, expires: Option<u64>) -> Owned {
        Owned { line, expires, counters: (0, 0) }
    }
}

/// One change of a chain, shown as iptables takes it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Edit {
    Delete(Owned),
    /// It becomes the chain's rule of this number; 1 is the front.
    Insert(usize, Owned),
}

impl fmt::Display for Edit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Edit::Delete(owned) => owned.write(f, "-D", 1),
            Edit::Insert(place, owned) => {
                owned.write(f, "-I", *place)?;
                match owned.counters {
                    (0, 0) => Ok(()),
                    (packets, bytes) => write!(f, " -c {packets} {bytes}"),
                }
            }
        }
    }
}

impl Owned {
    /// No word of it holds a space or a quote: names, numbers and addresses alone
    /// can get here.
    fn write(&self, f: &mut fmt::Formatter<'_>, verb: &str, place: usize) -> fmt::Result {
        let Line { rule, kind } = self.line;
        write!(f, "{verb} {}", rule.chain().name())?;
        if place > 1 {
            write!(f, " {place}")?;
        }
        let ((inp, out), (source, destination)) = (rule.ifaces(), rule.ends());
        for (option, iface) in [("-i", inp), ("-o", out)] {
            if iface != Iface::ANY {
                write!(f, " {option} {iface}")?;
            }
        }
        for (option, net) in [("-s", source), ("-d", destination)] {
            if !net.is_any() {
                write!(f, " {option} {net}")?;
            }
        }
        match kind {
            Kind::Plain => {}
            Kind::Guard(port) => {
                let option = if rule.chain() == Chain::Output { "--sport" } else { "--dport" };
                write!(f, " -p tcp -m tcp {option} {port}")?;
            }
            Kind::Set(end) => {
                let end = if end == End::Source { "src" } else { "dst" };
                write!(f, " -m set --match-set {} {end}", self.line)?;
            }
        }
        f.write_str(" -m comment --comment rfw")?;
        match (kind, self.expires) {
            (Kind::Guard(_), _) => f.write_str(":guard")?,
            (_, Some(second)) => write!(f, ":{second}")?,
            _ => {}
        }
        write!(f, " -j {}", rule.target.name())
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
    let (mut counters, mut set) = ((0, 0), None);
    while let Some(option) = words.next() {
        let value = words.next()?;
        match (option, value) {
            ("-c", packets) => counters = (packets.parse().ok()?, words.next()?.parse().ok()?),
            ("-m", name) => matches.push(name),
            ("--match-set", name) => set = Some((name, words.next()?)),
            ("--reject-with", "icmp-port-unreachable" | "icmp6-port-unreachable") => {}
            _ => options.push((option, value)),
        }
    }
    let mut take = |name: &str| {
        let at = options.iter().position(|(option, _)| *option == name)?;
        Some(options.swap_remove(at).1)
    };
    let port = match chain {
        Chain::Output => take("--sport"),
        _ => take("--dport"),
    };
    let comment = take("--comment")?.trim_matches('"').strip_prefix("rfw")?;
    let (kind, expires) = match (comment, take("-p"), port, set) {
        ("", None, None, None) => (Kind::Plain, None),
        ("", None, None, Some((_, "src"))) => (Kind::Set(End::Source), None),
        ("", None, None, Some((_, "dst"))) => (Kind::Set(End::Destination), None),
        (":guard", Some("tcp"), Some(port), None) => (Kind::Guard(port.parse().ok()?), None),
        (second, None, None, None) => {
            let second = second.strip_prefix(':').filter(|second| is_number(second))?;
            let expires: u64 = second.parse().ok().filter(|s: &u64| s.to_string() == second)?;
            (Kind::Plain, Some(expires))
        }
        _ => return None,
    };
    // In another order our own line would not find the rule again.
    let expected: &[&str] = match kind {
        Kind::Plain => &["comment"],
        Kind::Guard(_) => &["tcp", "comment"],
        Kind::Set(_) => &["set", "comment"],
    };
    if matches != expected {
        return None;
    }
    let target = take("-j")?;
    let target = Target::ALL.into_iter().find(|known| known.name() == target)?;
    let same = |name: &str| {
        Iface::parse(name).filter(|iface| *iface != Iface::ANY && iface.to_string() == name)
    };
    let mut iface = |option| take(option).map_or(Some(Iface::ANY), same);
    let (inp, out) = (iface("-i")?, iface("-o")?);
    let of_family = |text| Net::parse(text).filter(|net| net.family() == family);
    let mut net = |option| take(option).map_or(Some(Net::any(family)), of_family);
    let (source, destination) = (net("-s")?, net("-d")?);
    let scope = match (chain, (inp, source.is_any()), (out, destination.is_any())) {
        (Chain::Forward, ..) => Scope::Forward { inp, out, source, destination },
        (Chain::Input, _, (Iface::ANY, true)) => Scope::Input { iface: inp, source },
        (Chain::Output, (Iface::ANY, true), _) => Scope::Output { iface: out, destination },
        _ => return None,
    };
    let line = Line { rule: Rule { target, scope }, kind };
    let ours = match (kind, set) {
        (Kind::Plain, _) => line.rule.is_wellformed(),
        (Kind::Guard(_), _) => true,
        // The name says all that the rule says.
        (Kind::Set(end), set) => {
            let ends = [(Chain::Input, End::Destination), (Chain::Output, End::Source)];
            let named = set.is_some_and(|(name, _)| name == line.to_string());
            named && !ends.contains(&(chain, end)) && line.rule.addresses().next().is_none()
        }
    };
    (ours && options.is_empty()).then_some(Owned { line, expires, counters })
}

/// How long a batch of so many lines may take.
pub fn limit_of(lines: usize) -> Duration {
    let more = PER_LINE.saturating_mul(u32::try_from(lines).unwrap_or(u32::MAX));
    LIMIT.saturating_add(more).min(LONGEST_LIMIT)
}

/// The programs of one family: `iptables`, and `iptables-restore` beside it.
#[derive(Clone)]
pub struct Tools {
    pub family: Family,
    iptables: PathBuf,
    restore: PathBuf,
    pub presence: Arc<Presence>,
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

    /// Commits edits in order, all or none: one alone as the command that it is
    /// shown as, several in one transaction.
    pub fn commit(&self, edits: &[Edit]) -> Result<(), Failure> {
        if let [edit] = edits {
            let line = edit.to_string();
            let args: Vec<&str> = ["-w", LOCK_WAIT].into_iter().chain(line.split(' ')).collect();
            return exec::run(&self.presence, &self.iptables, &args, LIMIT, |_| Ok(()));
        }
        if edits.is_empty() {
            return Ok(());
        }
        let args = ["--noflush", "-w", LOCK_WAIT];
        exec::run(&self.presence, &self.restore, &args, limit_of(edits.len()), |input| {
            input.line("*filter")?;
            edits.iter().try_for_each(|edit| input.line(edit))?;
            input.line("COMMIT")
        })
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
        let mut left = MAX_LISTED;
        exec::lines(&self.iptables, &args, limit, |line| match parse_row(line, self.family) {
            Some((chain, row)) if left > 0 => {
                left = left.saturating_sub(1);
                each(chain, row)
            }
            row => row.is_none(),
        })?;
        match left {
            0 => Err(Failure::Passing(format!("There are {MAX_LISTED} rules and more."))),
            _ => Ok(()),
        }
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
            Some((_, Some(o))) => {
                let tag = match o.line.kind {
                    Kind::Guard(port) => format!("guard {port}"),
                    _ => o.expires.map_or("rfw".into(), |second| format!("rfw:{second}")),
                };
                format!("{} {tag} {:?}", o.line, o.counters)
            }
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
                "/accept/input/any/9.9.9.9 guard 7393 (0, 0)",
            ),
            (
                r#"-A OUTPUT -p tcp -m tcp --sport 7393 -m comment --comment "rfw:guard" -j DROP"#,
                "/drop/output/any/0.0.0.0 guard 7393 (0, 0)",
            ),
            (
                "-A INPUT -i a+ -m set --match-set rfw4:drop:in:a+ src -m comment --comment rfw -j DROP",
                "rfw4:drop:in:a+ rfw (0, 0)",
            ),
            (
                "-A FORWARD -o b1 -m set --match-set rfw6:accept:fwd:any:b1:dst dst -m comment --comment rfw -c 5 7 -j ACCEPT::",
                "foreign",
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
            "-A INPUT -m set --match-set rfw4:drop:in:any src -m comment --comment rfw:17 -j DROP",
            "-A INPUT -m set --match-set rfw4:drop:in:any dst -m comment --comment rfw -j DROP",
            "-A INPUT -m set --match-set rfw4:drop:in:any src -m comment --comment rfw -j ACCEPT",
            "-A INPUT -m set --match-set rfw6:drop:in:any src -m comment --comment rfw -j DROP",
            "-A INPUT -m set ! --match-set rfw4:drop:in:any src -m comment --comment rfw -j DROP",
            "-A INPUT -s 1.1.1.1/32 -m set --match-set rfw4:drop:in:any src -m comment --comment rfw -j DROP",
            "-A INPUT -i b1 -m set --match-set rfw4:drop:in:any src -m comment --comment rfw -j DROP",
            "-A INPUT -m set --match-set hers src -m comment --comment rfw -j DROP",
        ];
        for line in foreign {
            assert_eq!(read(line), "foreign", "{line}");
        }
        let of_the_other_family = "-A FORWARD -s ::/0 -m comment --comment rfw -j DROP";
        assert_eq!(parse_row(of_the_other_family, Family::V4), Some((Chain::Forward, None)));
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
            let owned = Owned::new(Line::plain(path.parse().unwrap()), None);
            assert_eq!(Edit::Delete(owned).to_string(), line);
            read_back(owned);
        }
        for path in ["drop/input/any", "reject/output/a", "accept/forward/br-lan"] {
            let segments: Vec<&str> = path.split('/').collect();
            let place = Place::parse(&segments).unwrap();
            for place in [place, Place { end: End::Destination, ..place }] {
                if place.chain != Chain::Input || place.end == End::Source {
                    read_back(Owned::new(Line::set(place, Family::V4), None));
                    read_back(Owned::new(Line::set(place, Family::V6), None));
                }
            }
        }
        let mut owned =
            Owned::new(Line::plain("/drop/input/any/1.2.3.4".parse().unwrap()), Some(9));
        owned.counters = (5, 7);
        let line = "-I INPUT 3 -s 1.2.3.4 -m comment --comment rfw:9 -j DROP -c 5 7";
        assert_eq!(Edit::Insert(3, owned).to_string(), line);
    }

    fn read_back(owned: Owned) {
        let rule = owned.line.rule;
        let listed = Edit::Insert(1, owned).to_string().replace("-I ", "-A ");
        assert_eq!(
            parse_row(&listed, rule.family()),
            Some((rule.chain(), Some(owned))),
            "{listed}"
        );
    }
}
