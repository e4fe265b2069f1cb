//! What rfw owns, as the kernel's tools write and read it, and those tools.
//!
//! Every rule of rfw's carries a comment, its [`Tag`]; a rule without one, or
//! of a shape that rfw does not make, is somebody else's and stays untouched.

use super::exec::{self, Failure};
use crate::rule::net::{Family, Net};
use crate::rule::{Chain, Iface, Rule, Scope, Target};
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// How long one command may take; a batch gets [`PER_LINE`] more a line.
const LIMIT: Duration = Duration::from_secs(10);
const PER_LINE: Duration = Duration::from_millis(10);
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
        match self {
            Tag::Until(second) => Some(second),
            Tag::Permanent | Tag::Guard(_) => None,
        }
    }

    /// Reads a comment; `port` is the one that the rule names.
    fn parse(comment: &str, port: Option<u16>) -> Option<Tag> {
        match (comment.strip_prefix("rfw")?, port) {
            ("", None) => Some(Tag::Permanent),
            (":guard", Some(port)) => Some(Tag::Guard(port)),
            (rest, None) => {
                let digits = rest.strip_prefix(':')?;
                let plain = digits.bytes().all(|b| b.is_ascii_digit()) && !digits.starts_with('0');
                digits.parse().ok().filter(|_| plain).map(Tag::Until)
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
    /// The rule.
    pub rule: Rule,
    /// Its comment.
    pub tag: Tag,
    /// Packets and bytes that it has met.
    pub counters: (u64, u64),
}

impl Owned {
    /// `-D CHAIN …`
    pub fn delete_line(&self) -> String {
        format!("-D {} {}", self.rule.chain().name(), Spec(self))
    }

    /// `-I CHAIN [PLACE] …`; place 1 is the front.
    pub fn insert_line(&self, place: usize) -> String {
        let chain = self.rule.chain().name();
        let counters = match self.counters {
            (0, 0) => String::new(),
            (packets, bytes) => format!(" -c {packets} {bytes}"),
        };
        match place {
            1 => format!("-I {chain} {}{counters}", Spec(self)),
            _ => format!("-I {chain} {place} {}{counters}", Spec(self)),
        }
    }
}

/// What follows the chain. No word of it holds a space or a quote: names,
/// numbers and addresses alone can get here.
struct Spec<'a>(&'a Owned);

impl fmt::Display for Spec<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Owned { rule, tag, .. } = self.0;
        let ((inp, out), (source, destination)) = (rule.ifaces(), rule.ends());
        for (option, iface) in [("-i", inp), ("-o", out)] {
            if iface != Iface::Any {
                write!(f, "{option} {iface} ")?;
            }
        }
        for (option, net) in [("-s", source), ("-d", destination)] {
            if !net.is_any() {
                write!(f, "{option} {net} ")?;
            }
        }
        if let Tag::Guard(port) = tag {
            let end = if rule.chain() == Chain::Output { "--sport" } else { "--dport" };
            write!(f, "-p tcp -m tcp {end} {port} ")?;
        }
        write!(f, "-m comment --comment {tag} -j {}", rule.target.name())
    }
}

/// One rule of a listing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Row {
    /// One of rfw's.
    Own(Owned),
    /// Anybody else's.
    Foreign,
}

impl Row {
    /// The rule, if it is one of rfw's.
    pub fn rule(&self) -> Option<Rule> {
        match self {
            Row::Own(owned) => Some(owned.rule),
            Row::Foreign => None,
        }
    }
}

/// Reads a line of `iptables -S` or `iptables -v -S`; `None` if it is no rule
/// of a built-in chain. The order of options varies with the version.
pub fn parse_row(line: &str, family: Family) -> Option<(Chain, Row)> {
    let mut words = line.trim_end().split(' ');
    let chain = match (words.next()?, words.next()?) {
        ("-A", name) => Chain::ALL.into_iter().find(|chain| chain.name() == name)?,
        _ => return None,
    };
    let owned = match line.contains("rfw") {
        true => Options::parse(words).and_then(|options| options.owned(chain, family)),
        false => None,
    };
    Some((chain, owned.map_or(Row::Foreign, Row::Own)))
}

/// The options of one listed rule, each at most once.
#[derive(Default)]
struct Options<'a> {
    inp: Option<&'a str>,
    out: Option<&'a str>,
    source: Option<&'a str>,
    destination: Option<&'a str>,
    protocol: Option<&'a str>,
    dport: Option<&'a str>,
    sport: Option<&'a str>,
    comment: Option<&'a str>,
    target: Option<&'a str>,
    reject: Option<&'a str>,
    packets: Option<&'a str>,
    bytes: Option<&'a str>,
}

impl<'a> Options<'a> {
    /// `None` at the first option that no rule of rfw's has.
    fn parse(mut words: impl Iterator<Item = &'a str>) -> Option<Options<'a>> {
        let mut options = Options::default();
        while let Some(option) = words.next() {
            let value = words.next()?;
            let slot = match option {
                "-i" => &mut options.inp,
                "-o" => &mut options.out,
                "-s" => &mut options.source,
                "-d" => &mut options.destination,
                "-p" => &mut options.protocol,
                "--dport" => &mut options.dport,
                "--sport" => &mut options.sport,
                "--comment" => &mut options.comment,
                "-j" => &mut options.target,
                "--reject-with" => &mut options.reject,
                "-c" => {
                    options.bytes = words.next();
                    &mut options.packets
                }
                "-m" if matches!(value, "comment" | "tcp") => continue,
                _ => return None,
            };
            let value = value.strip_prefix('"').and_then(|v| v.strip_suffix('"')).unwrap_or(value);
            if slot.replace(value).is_some() {
                return None;
            }
        }
        Some(options)
    }

    fn owned(&self, chain: Chain, family: Family) -> Option<Owned> {
        let port = match (self.protocol, self.dport, self.sport, chain) {
            (None, None, None, _) => None,
            (Some("tcp"), Some(port), None, Chain::Input) => Some(port.parse().ok()?),
            (Some("tcp"), None, Some(port), Chain::Output) => Some(port.parse().ok()?),
            _ => return None,
        };
        let tag = Tag::parse(self.comment?, port)?;
        let rule = Rule { target: self.target()?, scope: self.scope(chain, family)? };
        let count = |text: Option<&str>| text.unwrap_or("0").parse().ok();
        let counters = (count(self.packets)?, count(self.bytes)?);
        let ours = matches!(tag, Tag::Guard(_)) || rule.is_wellformed();
        ours.then_some(Owned { rule, tag, counters })
    }

    fn target(&self) -> Option<Target> {
        let names = [Target::Drop, Target::Accept, Target::Reject];
        let target = names.into_iter().find(|target| Some(target.name()) == self.target)?;
        match (target, self.reject) {
            (_, None) => Some(target),
            (Target::Reject, Some("icmp-port-unreachable" | "icmp6-port-unreachable")) => {
                Some(target)
            }
            _ => None,
        }
    }

    fn scope(&self, chain: Chain, family: Family) -> Option<Scope> {
        let iface = |name: Option<&str>| name.map_or(Some(Iface::Any), Iface::from_kernel);
        let net = |text: Option<&str>| match text {
            None => Some(Net::any(family)),
            Some(text) => Net::parse(text).filter(|net| net.family() == family),
        };
        let (inp, out) = (iface(self.inp)?, iface(self.out)?);
        let (source, destination) = (net(self.source)?, net(self.destination)?);
        match chain {
            Chain::Input if out == Iface::Any && destination.is_any() => {
                Some(Scope::Input { iface: inp, source })
            }
            Chain::Output if inp == Iface::Any && source.is_any() => {
                Some(Scope::Output { iface: out, destination })
            }
            Chain::Forward => Some(Scope::Forward { inp, out, source, destination }),
            _ => None,
        }
    }
}

/// A rule for `GET /list`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Listed {
    /// The rule.
    pub rule: Rule,
    /// Its place in its chain, everybody's rules counted, from 1.
    pub num: usize,
    /// Packets that it has met.
    pub packets: u64,
    /// Bytes that it has met.
    pub bytes: u64,
    /// When it expires, in Unix seconds.
    pub expires: Option<u64>,
}

/// The programs of one family: `iptables`, and `iptables-restore` beside it.
#[derive(Clone, Debug)]
pub struct Tools {
    family: Family,
    iptables: PathBuf,
    restore: PathBuf,
}

impl Tools {
    /// `iptables` is an absolute path.
    pub fn new(family: Family, iptables: PathBuf) -> Tools {
        let mut restore = iptables.clone().into_os_string();
        restore.push("-restore");
        Tools { family, iptables, restore: restore.into() }
    }

    /// The family that they serve.
    pub fn family(&self) -> Family {
        self.family
    }

    /// Commits lines such as `-I INPUT …` in order, all or none: one alone as
    /// that very command, several in one transaction.
    pub fn commit(&self, lines: &[String]) -> Result<(), Failure> {
        match lines {
            [] => Ok(()),
            [line] => {
                let args: Vec<&str> =
                    ["-w", LOCK_WAIT].into_iter().chain(line.split(' ')).collect();
                exec::run(&self.iptables, &args, "", LIMIT)
            }
            _ => {
                let input = format!("*filter\n{}\nCOMMIT\n", lines.join("\n"));
                let count = u32::try_from(lines.len()).unwrap_or(u32::MAX);
                let limit = LIMIT.saturating_add(PER_LINE.saturating_mul(count));
                exec::run(&self.restore, &["--noflush", "-w", LOCK_WAIT], &input, limit)
            }
        }
    }

    /// Reads every rule of the built-in chains, or of one, with its counters.
    pub fn list(
        &self,
        chain: Option<Chain>,
        mut each: impl FnMut(Chain, Row) -> bool,
    ) -> Result<(), Failure> {
        let mut args = vec!["-w", LOCK_WAIT, "-v", "-S"];
        args.extend(chain.map(Chain::name));
        // As long as a listing of a hundred thousand rules takes, and more.
        let limit = LIMIT.saturating_mul(3);
        exec::lines(&self.iptables, &args, limit, |line| match parse_row(line, self.family) {
            Some((chain, row)) => each(chain, row),
            None => true,
        })
    }
}
