//! rfw's sets as ipset writes and reads them, and the program that does it.
//!
//! ```text
//! name  = "rfw" ( "4" / "6" ) ":" target ":" where        ; 31 bytes at most
//! where = ( "in:" iface / "out:" iface / "fwd:" iface ":" iface ":" ( "src" / "dst" ) ) [ "@" tag ]
//!       / ( "in" / "out" / "fwd" ) ":~" 14HEXDIG
//!                    ; a hash of the rest, if the name is too long or an interface has an @
//! ```

use super::process::{Program, Programs, ToolError};
use crate::rule::net::{Family, Net};
use crate::rule::{Chain, RuleTemplate, Side, Target};
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// The path of ipset if rfw.conf does not name one.
pub const DEFAULT_PATH: &str = "/sbin/ipset";
/// The longest name (ip_set.h: IPSET_MAXNAMELEN less the NUL).
const MAX_NAME: usize = 31;

/// Instead of a timeout: an entry that is an exception from a block. rfw writes none, and repairs it.
pub const NOMATCH: u32 = u32::MAX;

/// The name of a template's set.
pub fn set_name(template: &RuleTemplate, family: Family) -> String {
    let digit = if family == Family::V4 { 4 } else { 6 };
    let target = template.target.name().to_ascii_lowercase();
    let RuleTemplate { in_iface, out_iface, tag, .. } = template;
    let side = if template.side == Side::Source { "src" } else { "dst" };
    let (chain, ifaces) = match template.chain {
        Chain::Input => ("in", in_iface.to_string()),
        Chain::Output => ("out", out_iface.to_string()),
        Chain::Forward => ("fwd", format!("{in_iface}:{out_iface}:{side}")),
    };
    let name = format!("rfw{digit}:{target}:{chain}:{ifaces}{tag}");
    if name.len() <= MAX_NAME && !ifaces.contains('@') {
        return name;
    }
    let rest = ifaces + &tag.to_string().replace('@', "/");
    format!("rfw{digit}:{target}:{chain}:~{:014x}", hash(&rest))
}

/// The upper 56 bits of FNV-1a.
fn hash(text: &str) -> u64 {
    let step = |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    text.bytes().fold(0xcbf2_9ce4_8422_2325, step) >> 8
}

/// The name of a set that replaces another one. If it remains, the next start destroys it.
pub fn replacement_name(name: &str) -> String {
    name.replacen(':', "?", 1)
}

/// Whether a set is one of rfw's; versions up to 0.3 also had names with `+` and `-`.
fn is_own_name(name: &str) -> bool {
    let Some((family, rest)) = name.split_at_checked(4) else { return false };
    let target = rest.trim_start_matches([':', '?', '+', '-']).split(':').next();
    let known = |target: &str| Target::ALL.iter().any(|t| t.name().to_ascii_lowercase() == target);
    ["rfw4", "rfw6"].contains(&family) && rest.len() > 1 && target.is_some_and(known)
}

/// A set without its entries.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SetHeader {
    pub name: String,
    /// Whether rfw would create it in this form, apart from its size.
    pub is_compatible: bool,
    pub maxelem: usize,
    /// The number of entries that have not expired; `None` if the kernel does not count them.
    pub entries: Option<usize>,
}

/// An address in a set.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SetEntry {
    pub net: Net,
    /// Seconds left; 0 means permanent.
    pub timeout: u32,
    /// Packets and bytes that it has matched.
    pub counters: (u64, u64),
}

/// One change to sets; `Display` writes it as an ipset command.
pub enum SetEdit<'a> {
    /// A set for at most `maxelem` entries, with room for `entries` from the start.
    Create {
        name: &'a str,
        family: Family,
        entries: usize,
        maxelem: usize,
    },
    Add {
        name: &'a str,
        net: Net,
        timeout: u32,
    },
    Delete {
        name: &'a str,
        net: Net,
    },
    Flush(&'a str),
    Swap(&'a str, &'a str),
    Destroy(&'a str),
}

impl fmt::Display for SetEdit<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SetEdit::Create { name, family, entries, maxelem } => {
                let family = if *family == Family::V4 { "inet" } else { "inet6" };
                // The size that the kernel's hash table would grow to.
                let hashsize = (entries / 4).next_power_of_two().max(1024);
                let maxelem = maxelem.max(entries);
                write!(f, "create {name} hash:net family {family} ")?;
                write!(f, "hashsize {hashsize} maxelem {maxelem} timeout 0 counters")
            }
            SetEdit::Add { name, net, timeout } => write!(f, "add {name} {net} timeout {timeout}"),
            SetEdit::Delete { name, net } => write!(f, "del {name} {net}"),
            SetEdit::Flush(name) => write!(f, "flush {name}"),
            SetEdit::Swap(a, b) => write!(f, "swap {a} {b}"),
            SetEdit::Destroy(name) => write!(f, "destroy {name}"),
        }
    }
}

/// The program `ipset`.
#[derive(Clone)]
pub struct Ipset(Program);

impl Ipset {
    /// `program` is an absolute path.
    pub fn new(program: PathBuf, programs: Arc<Programs>) -> Ipset {
        Ipset(Program::new(program, programs))
    }

    /// rfw's sets. ipset exits with 0 even if it could not read them all.
    pub fn headers(&self, limit: Duration) -> Result<Vec<SetHeader>, ToolError> {
        let mut headers = Vec::new();
        self.0.read_lines(&["list", "-terse"], limit, |line| {
            if let Some(line) = line.strip_suffix('\n') {
                parse_header(line.trim_end(), &mut headers);
            }
            true
        })?;
        headers.retain(is_own);
        Ok(headers)
    }

    /// Passes each entry of a set to `each` until that returns `false`. Returns whether the set
    /// exists. ipset exits with 0 even if it could not read all entries.
    pub fn read(
        &self,
        name: &str,
        limit: Duration,
        mut each: impl FnMut(SetEntry) -> bool,
    ) -> Result<bool, ToolError> {
        let (is_ipv6, mut found) = (name.starts_with("rfw6"), false);
        let read = self.0.read_lines(&["save", name], limit, |line| {
            found |= line.starts_with("create ");
            // rfw writes no IPv4-mapped address to a set for IPv6; as IPv4, it could not be deleted.
            let entry = parse_entry(line).filter(|e| (e.net.family() == Family::V6) == is_ipv6);
            entry.is_none_or(&mut each)
        });
        match read {
            Err(ToolError::Rejected(text)) if text.contains("does not exist") => Ok(false),
            Ok(()) if !found => {
                let message = format!("{} exited with 0 after an incomplete listing.", self.0);
                Err(ToolError::Transient(message))
            }
            result => result.map(|()| true),
        }
    }

    /// Whether a set has an address, or a block that contains it.
    pub fn contains(&self, name: &str, net: Net, limit: Duration) -> Result<bool, ToolError> {
        let net = net.to_string();
        match self.0.read_lines(&["test", name, &net], limit, |_| true) {
            Err(ToolError::Rejected(text)) if text.contains("is NOT in set") => Ok(false),
            Err(ToolError::Rejected(text)) if text.contains("does not exist") => Ok(false),
            result => result.map(|()| true),
        }
    }

    /// Carries out edits in order, a single one as the command that its `Display` shows. It is not
    /// an error if an entry exists already or does not exist any more. ipset has no transactions:
    /// the edits before the one that fails remain in effect.
    pub fn write(
        &self,
        edits: &mut dyn Iterator<Item = SetEdit<'_>>,
        limit: Duration,
    ) -> Result<(), ToolError> {
        let Some(first) = edits.next() else { return Ok(()) };
        let Some(second) = edits.next() else {
            let line = first.to_string();
            let args: Vec<&str> = ["-exist"].into_iter().chain(line.split(' ')).collect();
            return self.0.run(&args, limit, |_| Ok(()));
        };
        self.0.run(&["-exist", "restore"], limit, |stdin| {
            let mut edits = [first, second].into_iter().chain(edits);
            edits.try_for_each(|edit| stdin.line(edit))
        })
    }
}

/// Reads a line of `ipset list -terse`: `KEY: VALUE`, the name first.
fn parse_header(line: &str, headers: &mut Vec<SetHeader>) {
    let Some((key, value)) = line.split_once(": ") else { return };
    if key == "Name" {
        let name = value.to_string();
        headers.push(SetHeader { name, is_compatible: true, maxelem: 0, entries: None });
    }
    let Some(header) = headers.last_mut() else { return };
    match key {
        "Type" => header.is_compatible = value == "hash:net",
        "Header" => {
            let words: Vec<&str> = value.split(' ').collect();
            let family = if header.name.starts_with("rfw6") { "inet6" } else { "inet" };
            let expected = ["family", family, "timeout", "counters"];
            header.is_compatible &= expected.iter().all(|word| words.contains(word));
            let maxelem = words.iter().skip_while(|word| **word != "maxelem").nth(1);
            header.maxelem = maxelem.and_then(|number| number.parse().ok()).unwrap_or(0);
        }
        "Number of entries" => header.entries = value.parse().ok(),
        _ => {}
    }
}

/// Whether a header is that of one of rfw's sets. In an incomplete listing, the last one lacks its end and
/// is ignored.
fn is_own(header: &SetHeader) -> bool {
    is_own_name(&header.name) && (header.maxelem > 0 || !header.is_compatible)
}

/// Reads a line of `ipset save`: `add NAME NET [timeout N] [packets N bytes N]`.
pub fn parse_entry(line: &str) -> Option<SetEntry> {
    let mut words = line.trim_end().strip_prefix("add ")?.split(' ').skip(1);
    let mut entry = SetEntry { net: Net::parse(words.next()?)?, timeout: 0, counters: (0, 0) };
    while let Some(word) = words.next() {
        match word {
            "timeout" => entry.timeout = words.next()?.parse().ok()?,
            "packets" => entry.counters.0 = words.next()?.parse().ok()?,
            "bytes" => entry.counters.1 = words.next()?.parse().ok()?,
            "nomatch" => entry.timeout = NOMATCH,
            _ => {}
        }
    }
    Some(entry)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::firewall::process::tests::make_program;
    use crate::rule::Iface;
    use std::fs;

    #[test]
    fn names() {
        let long = "a-long-name-123";
        let table = [
            ("drop", "input", "any", "any", "rfw4:drop:in:any"),
            ("reject", "output", "any", long, "rfw4:reject:out:a-long-name-123"),
            ("reject", "input", "br-lan", "any", "rfw4:reject:in:br-lan+"),
            ("accept", "forward", "eth0", "any", "rfw4:accept:fwd:eth0:any:src"),
            ("accept", "forward", "eth0", "ppp+", "rfw4:accept:fwd:eth0:ppp+:src"),
            ("reject", "forward", long, "any", "rfw4:reject:fwd:~68e9884a65c005"),
            ("drop", "forward", long, long, "rfw4:drop:fwd:~a5626d73481bc9"),
        ];
        for (target, chain, in_iface, out_iface, name) in table {
            let iface = if in_iface == "any" { out_iface } else { in_iface };
            let mut template = RuleTemplate::parse(&[target, chain, iface]).unwrap();
            if chain == "forward" {
                template.out_iface = Iface::parse(out_iface).unwrap();
            }
            assert_eq!(set_name(&template, Family::V4), name);
            assert!(name.len() <= MAX_NAME && is_own_name(name), "{name}");
        }
    }

    #[test]
    fn own_names() {
        assert_eq!(replacement_name("rfw4:drop:in:any"), "rfw4?drop:in:any");
        let own = ["rfw4:drop:in:any", "rfw4?drop:in:any", "rfw6-accept:out:eth0", "rfw6+reject:x"];
        assert_eq!(own.iter().filter(|name| is_own_name(name)).count(), own.len());
        for name in ["rfw5:drop:x", "abc4:drop:x", "rfw4:list", "rfw4", "r", "rfw\u{e9}:drop", ""] {
            assert!(!is_own_name(name), "{name}");
        }
    }

    #[test]
    fn headers() {
        let listing = "\
Name: rfw4:drop:in:any
Type: hash:net
Revision: 7
Header: family inet hashsize 1024 maxelem 65536 timeout 0 counters bucketsize 12 initval 0x9
Size in memory: 1240
References: 1
Number of entries: 12

Name: rfw6:drop:in:any
Type: hash:net
Header: family inet hashsize 1024 maxelem 9 timeout 0 counters
Name: rfw4:accept:in:any
Type: hash:ip
Header: family inet hashsize 1024 maxelem 9 timeout 0 counters
Name: mine
Type: hash:net
Header: family inet hashsize 1024 maxelem 9 timeout 0 counters
Name: rfw4:reject:in:any
Type: bitmap:ip
Header: range 10.0.0.0-10.0.0.9
Name: rfw4:drop:out:any
Type: hash:net
";
        let mut headers = Vec::new();
        listing.lines().for_each(|line| parse_header(line, &mut headers));
        headers.retain(is_own);
        let show =
            |h: &SetHeader| format!("{} {} {} {:?}", h.name, h.is_compatible, h.maxelem, h.entries);
        let shown: Vec<String> = headers.iter().map(show).collect();
        let expected = [
            "rfw4:drop:in:any true 65536 Some(12)",
            "rfw6:drop:in:any false 9 None",
            "rfw4:accept:in:any false 9 None",
            "rfw4:reject:in:any false 0 None",
        ];
        assert_eq!(shown, expected);
    }

    #[test]
    fn edits() {
        let (name, net) = ("rfw4:drop:in:any", Net::parse("1.2.3.0/24").unwrap());
        let create = |entries| SetEdit::Create { name, family: Family::V4, entries, maxelem: 9 };
        let table = [
            (
                create(0),
                "create rfw4:drop:in:any hash:net family inet hashsize 1024 maxelem 9 timeout 0 counters",
            ),
            (
                create(10_000),
                "create rfw4:drop:in:any hash:net family inet hashsize 4096 maxelem 10000 timeout 0 counters",
            ),
            (SetEdit::Add { name, net, timeout: 7 }, "add rfw4:drop:in:any 1.2.3.0/24 timeout 7"),
            (SetEdit::Delete { name, net }, "del rfw4:drop:in:any 1.2.3.0/24"),
            (SetEdit::Swap("a", "b"), "swap a b"),
            (SetEdit::Destroy("a"), "destroy a"),
        ];
        for (edit, line) in table {
            assert_eq!(edit.to_string(), line);
        }
    }

    #[test]
    fn entries() {
        let table = [
            ("add s 1.2.3.4\n", "1.2.3.4 0 (0, 0)"),
            ("add s 1.2.3.0/24 timeout 90 packets 5 bytes 7\n", "1.2.3.0/24 90 (5, 7)"),
            ("add s 2001:db8::/64 timeout 0\n", "2001:db8::/64 0 (0, 0)"),
            ("add s 1.2.3.4 timeout 0 packets 5 bytes 7 nomatch\n", "1.2.3.4 4294967295 (5, 7)"),
            ("create s hash:net family inet timeout 0", "none"),
            ("add s example.com", "none"),
        ];
        for (line, entry) in table {
            let read = parse_entry(line)
                .map_or("none".into(), |SetEntry { net, timeout, counters }| {
                    format!("{net} {timeout} {counters:?}")
                });
            assert_eq!(read, entry, "{line}");
        }
    }

    /// The program's second argument is the set's name.
    #[test]
    fn what_is_read_of_the_program() {
        let limit = Duration::from_secs(60);
        let path = make_program(
            "rfw-ipset",
            r#"case $2 in
            -terse) printf 'Name: rfw4:drop:x\nType: hash:net\nHeader: family inet maxelem 9\nName: rf' ;;
            rfw?:none) echo 'The set with the given name does not exist' >&2; exit 1 ;;
            rfw?:held) echo 'Set cannot be listed' >&2; exit 1 ;;
            rfw?:cut) ;;
            *) printf "create $2 hash:net\nadd $2 1.2.3.4\nadd $2 2001:db8::1\nadd $2 5.6.7.8\n" ;;
            esac"#,
        );
        let ipset = Ipset::new(path.clone(), Arc::default());
        let read = |name, most| {
            let mut nets = Vec::new();
            let each = |entry: SetEntry| {
                nets.push(entry.net.to_string());
                nets.len() < most
            };
            let found = ipset.read(name, limit, each).map_err(|error| error.to_string());
            (found, nets.join(" "))
        };
        let incomplete = format!("{} exited with 0 after an incomplete listing.", path.display());
        let table = [
            ("rfw4:all", 9, Ok(true), "1.2.3.4 5.6.7.8"),
            ("rfw6:all", 9, Ok(true), "2001:db8::1"),
            ("rfw4:first", 1, Ok(true), "1.2.3.4"),
            ("rfw4:none", 9, Ok(false), ""),
            ("rfw4:held", 9, Err("Set cannot be listed".into()), ""),
            ("rfw4:cut", 9, Err(incomplete), ""),
        ];
        for (name, most, found, nets) in table {
            assert_eq!(read(name, most), (found, nets.into()), "{name}");
        }
        let names: Vec<_> = ipset.headers(limit).unwrap().into_iter().map(|h| h.name).collect();
        assert_eq!(names, ["rfw4:drop:x"]);
        fs::remove_file(path).unwrap();
    }
}
