//! What a rule is: pure values, no input or output.
//!
//! A rule has one text form, its API path, read by [`Rule::parse`] and written
//! by `Display`:
//!
//! ```text
//! rule    = "/" target "/" ( "input" / "output" ) "/" iface "/" block
//!         / "/" target "/forward/" iface "/" block [ "/" iface [ "/" block ] ]
//! target  = "drop" / "accept" / "reject"          ; any letter case, like chains
//! block   = address [ "/" prefix ]
//! iface   = "any" / name [ "+" ]
//! ```

pub mod interval;
pub mod net;
pub mod whitelist;

use net::{Family, Net, decimal};
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

/// The shortest prefixes that a rule may name: wider blocks lock out half the
/// world too easily.
pub const WIDEST_V4: u8 = 9;
/// The same for IPv6.
pub const WIDEST_V6: u8 = 17;

fn widest(family: Family) -> u8 {
    match family {
        Family::V4 => WIDEST_V4,
        Family::V6 => WIDEST_V6,
    }
}

/// What happens to a packet.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Target {
    /// Dropped without a word.
    Drop,
    /// Let through.
    Accept,
    /// Refused with an ICMP message.
    Reject,
}

impl Target {
    /// The name that iptables uses.
    pub fn name(self) -> &'static str {
        match self {
            Target::Drop => "DROP",
            Target::Accept => "ACCEPT",
            Target::Reject => "REJECT",
        }
    }

    /// Reads a name in any letter case.
    pub fn parse(name: &str) -> Option<Target> {
        let all = [Target::Drop, Target::Accept, Target::Reject];
        all.into_iter().find(|target| target.name().eq_ignore_ascii_case(name))
    }
}

/// A built-in chain of the filter table.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Chain {
    /// Packets for this host.
    Input,
    /// Packets that this host routes.
    Forward,
    /// Packets that this host sends.
    Output,
}

impl Chain {
    /// All three, in the order in which iptables lists them.
    pub const ALL: [Chain; 3] = [Chain::Input, Chain::Forward, Chain::Output];

    /// The name that iptables uses.
    pub fn name(self) -> &'static str {
        match self {
            Chain::Input => "INPUT",
            Chain::Forward => "FORWARD",
            Chain::Output => "OUTPUT",
        }
    }

    /// Reads a name in any letter case.
    pub fn parse(name: &str) -> Option<Chain> {
        Chain::ALL.into_iter().find(|chain| chain.name().eq_ignore_ascii_case(name))
    }
}

/// A name of at most 15 bytes of `[A-Za-z0-9._@-]` that starts with neither
/// `-` nor `.`: it needs no quoting anywhere.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Name {
    bytes: [u8; Name::MAX],
    length: u8,
}

impl Name {
    /// The kernel's IFNAMSIZ, less the NUL.
    const MAX: usize = 15;

    fn parse(text: &str) -> Option<Name> {
        let wrong = |b: u8| !(b.is_ascii_alphanumeric() || b"._@-".contains(&b));
        if text.is_empty() || text.starts_with(['-', '.']) || text.bytes().any(wrong) {
            return None;
        }
        let mut bytes = [0; Name::MAX];
        bytes.get_mut(..text.len())?.copy_from_slice(text.as_bytes());
        Some(Name { bytes, length: u8::try_from(text.len()).ok()? })
    }

    fn as_str(&self) -> &str {
        let name = self.bytes.get(..usize::from(self.length)).unwrap_or_default();
        std::str::from_utf8(name).unwrap_or_default()
    }
}

/// Which interfaces a rule is about.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Iface {
    /// Every interface.
    Any,
    /// The interface of this name.
    Exact(Name),
    /// All whose names start so; iptables writes `name+`.
    Prefix(Name),
}

impl Iface {
    /// Reads `any`, a name that ends in a digit (that interface), or another
    /// name or `name+` (all that start so). With its `+` a name has at most 15
    /// bytes, as iptables takes them.
    pub fn parse(text: &str) -> Option<Iface> {
        if text == "any" {
            return Some(Iface::Any);
        }
        let stem = text.strip_suffix('+').unwrap_or(text);
        if stem == text && stem.ends_with(|c: char| c.is_ascii_digit()) {
            return Some(Iface::Exact(Name::parse(stem)?));
        }
        Some(Iface::Prefix(Name::parse(stem).filter(|_| stem.len() < Name::MAX)?))
    }

    /// Reads what iptables lists, where a name without `+` is exact.
    pub fn from_kernel(text: &str) -> Option<Iface> {
        match text.strip_suffix('+') {
            Some(stem) => Some(Iface::Prefix(Name::parse(stem)?)),
            None => Iface::parse(text).filter(|iface| matches!(iface, Iface::Exact(_))),
        }
    }

    fn overlaps(&self, other: &Iface) -> bool {
        match (self, other) {
            (Iface::Any, _) | (_, Iface::Any) => true,
            (Iface::Exact(a), Iface::Exact(b)) => a == b,
            (Iface::Exact(name), Iface::Prefix(stem))
            | (Iface::Prefix(stem), Iface::Exact(name)) => name.as_str().starts_with(stem.as_str()),
            (Iface::Prefix(a), Iface::Prefix(b)) => {
                a.as_str().starts_with(b.as_str()) || b.as_str().starts_with(a.as_str())
            }
        }
    }
}

/// As the path and iptables both write it; `any` is for the path alone.
impl fmt::Display for Iface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Iface::Any => f.write_str("any"),
            Iface::Exact(name) => f.write_str(name.as_str()),
            Iface::Prefix(name) => write!(f, "{}+", name.as_str()),
        }
    }
}

/// Which packets a rule is about: exactly the fields that the chain has.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
#[allow(missing_docs, reason = "the fields say what they are")]
pub enum Scope {
    /// To this host.
    Input { iface: Iface, source: Net },
    /// From this host.
    Output { iface: Iface, destination: Net },
    /// Through this host; both blocks are of one family.
    Forward { inp: Iface, out: Iface, source: Net, destination: Net },
}

/// One rule of rfw's.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Rule {
    /// What happens to the packets.
    pub target: Target,
    /// Which packets.
    pub scope: Scope,
}

/// What is to be done about a rule.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Have it, for so many seconds; 0 is for ever.
    Put(u64),
    /// Have it no more.
    Delete,
}

/// A rule and what is to be done about it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Change {
    /// The rule.
    pub rule: Rule,
    /// What is to be done.
    pub action: Action,
}

/// Why a path names no rule. The text is the segment at fault.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RuleError {
    /// The first segment is no target.
    NoTarget(String),
    /// The second segment is no chain.
    NoChain(String),
    /// Too few or too many segments.
    Shape,
    /// Not an interface name.
    Iface(String),
    /// Not an address.
    Address(String),
    /// All addresses, outside FORWARD.
    AnyAddress,
    /// Addresses of two families in one rule.
    Families,
    /// Not a prefix length, or too short a one.
    Mask(String),
}

impl Rule {
    /// Reads the segments of a path, slashes taken off.
    pub fn parse(segments: &[&str]) -> Result<Rule, RuleError> {
        let [target, rest @ ..] = segments else {
            return Err(RuleError::Shape);
        };
        let target =
            Target::parse(target).ok_or_else(|| RuleError::NoTarget(target.to_string()))?;
        let [chain, rest @ ..] = rest else {
            return Err(RuleError::Shape);
        };
        let chain = Chain::parse(chain).ok_or_else(|| RuleError::NoChain(chain.to_string()))?;
        let (iface, rest) = take_iface(rest)?;
        let (block, rest) = take_block(chain, rest)?;
        let scope = match chain {
            Chain::Input => Scope::Input { iface, source: not_any(block)? },
            Chain::Output => Scope::Output { iface, destination: not_any(block)? },
            Chain::Forward => return forward(target, iface, block, rest),
        };
        if !rest.is_empty() {
            return Err(RuleError::Shape);
        }
        Ok(Rule { target, scope })
    }

    /// The chain that it stands in.
    pub fn chain(&self) -> Chain {
        match self.scope {
            Scope::Input { .. } => Chain::Input,
            Scope::Output { .. } => Chain::Output,
            Scope::Forward { .. } => Chain::Forward,
        }
    }

    /// The tables that it stands in.
    pub fn family(&self) -> Family {
        let (source, _) = self.ends();
        source.family()
    }

    /// Incoming and outgoing interface.
    pub fn ifaces(&self) -> (Iface, Iface) {
        match self.scope {
            Scope::Input { iface, .. } => (iface, Iface::Any),
            Scope::Output { iface, .. } => (Iface::Any, iface),
            Scope::Forward { inp, out, .. } => (inp, out),
        }
    }

    /// Source and destination.
    pub fn ends(&self) -> (Net, Net) {
        match self.scope {
            Scope::Input { source, .. } => (source, Net::any(source.family())),
            Scope::Output { destination, .. } => (Net::any(destination.family()), destination),
            Scope::Forward { source, destination, .. } => (source, destination),
        }
    }

    /// The blocks that it names; "any address" is none.
    pub fn addresses(&self) -> impl Iterator<Item = Net> {
        let (source, destination) = self.ends();
        [source, destination].into_iter().filter(|net| !net.is_any())
    }

    /// Whether a path could name it: what the kernel lists need not.
    pub fn is_wellformed(&self) -> bool {
        let narrow = |net: Net| net.prefix() >= widest(net.family()) && !net.is_unspecified();
        let named = self.chain() == Chain::Forward || self.addresses().next().is_some();
        named && self.addresses().all(narrow)
    }

    /// Whether some packet is a matter of both rules.
    pub fn overlaps(&self, other: &Rule) -> bool {
        let ((inp, out), (other_inp, other_out)) = (self.ifaces(), other.ifaces());
        let ((from, to), (other_from, other_to)) = (self.ends(), other.ends());
        self.chain() == other.chain()
            && from.overlaps(&other_from)
            && to.overlaps(&other_to)
            && inp.overlaps(&other_inp)
            && out.overlaps(&other_out)
    }
}

impl FromStr for Rule {
    type Err = RuleError;

    fn from_str(path: &str) -> Result<Rule, RuleError> {
        let path = path.strip_prefix('/').ok_or(RuleError::Shape)?;
        Rule::parse(&path.split('/').collect::<Vec<_>>())
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (target, chain) = (self.target.name(), self.chain().name());
        write!(f, "/{}/{}", target.to_ascii_lowercase(), chain.to_ascii_lowercase())?;
        match self.scope {
            Scope::Input { iface, source: block } | Scope::Output { iface, destination: block } => {
                write!(f, "/{iface}/{block}")
            }
            Scope::Forward { inp, out, source, destination } => {
                write!(f, "/{inp}/{}", PathBlock(source))?;
                if out == Iface::Any && destination.is_any() {
                    return Ok(());
                }
                // An interface may be called `24`: only behind a prefix is it one.
                if source.is_host() && is_number(&out.to_string()) {
                    write!(f, "/{}", source.prefix())?;
                }
                write!(f, "/{out}")?;
                match destination.is_any() {
                    true => Ok(()),
                    false => write!(f, "/{destination}"),
                }
            }
        }
    }
}

/// A block in a path, where "any address" has no prefix.
struct PathBlock(Net);

impl fmt::Display for PathBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.is_any() {
            true => write!(f, "{}", self.0.addr()),
            false => write!(f, "{}", self.0),
        }
    }
}

fn forward(target: Target, inp: Iface, source: Net, rest: &[&str]) -> Result<Rule, RuleError> {
    let (out, rest) = match rest {
        [] => (Iface::Any, rest),
        _ => take_iface(rest)?,
    };
    let (destination, rest) = match rest {
        [] => (Net::any(source.family()), rest),
        _ => take_block(Chain::Forward, rest)?,
    };
    if !rest.is_empty() {
        return Err(RuleError::Shape);
    }
    if source.family() != destination.family() {
        return Err(RuleError::Families);
    }
    Ok(Rule { target, scope: Scope::Forward { inp, out, source, destination } })
}

fn take_iface<'a, 'b>(segments: &'a [&'b str]) -> Result<(Iface, &'a [&'b str]), RuleError> {
    let [iface, rest @ ..] = segments else {
        return Err(RuleError::Shape);
    };
    Ok((Iface::parse(iface).ok_or_else(|| RuleError::Iface(iface.to_string()))?, rest))
}

/// Takes an address and the prefix length that may follow: in FORWARD an
/// interface may follow as well, and only a number is a prefix length. Without
/// one, `0.0.0.0` and `::` are "any address"; as a single host they are nobody.
fn take_block<'a, 'b>(
    chain: Chain,
    segments: &'a [&'b str],
) -> Result<(Net, &'a [&'b str]), RuleError> {
    let [address, rest @ ..] = segments else {
        return Err(RuleError::Shape);
    };
    let wrong = || RuleError::Address(address.to_string());
    let host = Net::host(address.parse::<IpAddr>().map_err(|_| wrong())?);
    let unspecified = host.is_unspecified();
    let (net, rest) = match rest {
        [mask, rest @ ..] if chain != Chain::Forward || is_number(mask) => {
            (with_mask(host, mask)?, rest)
        }
        _ if unspecified => return Ok((Net::any(host.family()), rest)),
        _ => (host, rest),
    };
    if net.is_unspecified() {
        return Err(wrong());
    }
    Ok((net, rest))
}

fn is_number(segment: &str) -> bool {
    !segment.is_empty() && segment.bytes().all(|b| b.is_ascii_digit())
}

fn with_mask(host: Net, mask: &str) -> Result<Net, RuleError> {
    decimal(mask)
        .filter(|prefix| *prefix >= widest(host.family()))
        .and_then(|prefix| Net::new(host.addr(), prefix))
        .ok_or_else(|| RuleError::Mask(mask.to_string()))
}

fn not_any(net: Net) -> Result<Net, RuleError> {
    match net.is_any() {
        true => Err(RuleError::AnyAddress),
        false => Ok(net),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_their_canonical_form() {
        let table = [
            ("/drop/input/any/1.2.3.4", "/drop/input/any/1.2.3.4"),
            ("/DROP/Input/eth0/1.2.3.4/32", "/drop/input/eth0/1.2.3.4"),
            ("/reject/output/ppp/7.7.7.77/24", "/reject/output/ppp+/7.7.7.0/24"),
            ("/accept/input/ppp+/1.2.3.4/9", "/accept/input/ppp+/1.0.0.0/9"),
            ("/drop/input/eth0+/1.2.3.4", "/drop/input/eth0+/1.2.3.4"),
            ("/drop/input/Eth0.5@x-1/1.2.3.4", "/drop/input/Eth0.5@x-1/1.2.3.4"),
            ("/drop/input/abcdefghijklmn5/1.2.3.4", "/drop/input/abcdefghijklmn5/1.2.3.4"),
            ("/drop/input/abcdefghijklmn/1.2.3.4", "/drop/input/abcdefghijklmn+/1.2.3.4"),
            ("/drop/input/any/2001:DB8::1/64", "/drop/input/any/2001:db8::/64"),
            ("/drop/input/any/::ffff:1.2.3.4/24", "/drop/input/any/1.2.3.0/24"),
            ("/drop/input/any/0.0.0.5/24", "/drop/input/any/0.0.0.0/24"),
            ("/drop/forward/any/0.0.0.0", "/drop/forward/any/0.0.0.0"),
            ("/drop/forward/any/::/eth1", "/drop/forward/any/::/eth1"),
            ("/drop/forward/any/1.2.3.4/any/0.0.0.0", "/drop/forward/any/1.2.3.4"),
            ("/drop/forward/eth0/1.2.3.4/24/eth1", "/drop/forward/eth0/1.2.3.0/24/eth1"),
            ("/drop/forward/eth0/1.2.3.4/32/24", "/drop/forward/eth0/1.2.3.4/32/24"),
            (
                "/drop/forward/eth0/0.0.0.0/ppp/5.6.7.8/31",
                "/drop/forward/eth0/0.0.0.0/ppp+/5.6.7.8/31",
            ),
            ("/drop/forward/any/1.2.3.4/any/5.6.7.8", "/drop/forward/any/1.2.3.4/any/5.6.7.8"),
        ];
        for (path, canonical) in table {
            let rule: Rule = path.parse().expect(path);
            assert_eq!(rule.to_string(), canonical, "{path}");
            assert_eq!(canonical.parse(), Ok(rule), "{canonical}");
        }
    }

    #[test]
    fn paths_that_name_no_rule() {
        use RuleError::*;
        let text = |s: &str| s.to_string();
        let table = [
            ("drop/input/any/1.2.3.4", Shape),
            ("/drop", Shape),
            ("/drop/input", Shape),
            ("/drop/input/any", Shape),
            ("/drop/input/any/1.2.3.4/24/5", Shape),
            ("/drop/forward/any/1.2.3.4/", Iface(text(""))),
            ("/drop/input/any/1.2.3.4/", Mask(text(""))),
            ("/drop/input/any/1.2.3.4/-1", Mask(text("-1"))),
            ("/drop/forward/any/1.2.3.4/-1", Iface(text("-1"))),
            ("/drop/forward/any/1.2.3.4/any/5.6.7.8/32/x", Shape),
            ("/log/input/any/1.2.3.4", NoTarget(text("log"))),
            ("//input/any/1.2.3.4", NoTarget(text(""))),
            ("/drop/prerouting/any/1.2.3.4", NoChain(text("prerouting"))),
            ("/drop/input/+/1.2.3.4", Iface(text("+"))),
            ("/drop/input//1.2.3.4", Iface(text(""))),
            ("/drop/input/-i/1.2.3.4", Iface(text("-i"))),
            ("/drop/input/.x/1.2.3.4", Iface(text(".x"))),
            ("/drop/input/e h/1.2.3.4", Iface(text("e h"))),
            ("/drop/input/eth+0/1.2.3.4", Iface(text("eth+0"))),
            ("/drop/input/é0/1.2.3.4", Iface(text("é0"))),
            ("/drop/input/abcdefghijklmno5/1.2.3.4", Iface(text("abcdefghijklmno5"))),
            ("/drop/input/abcdefghijklmno/1.2.3.4", Iface(text("abcdefghijklmno"))),
            ("/drop/input/any/1.2.3", Address(text("1.2.3"))),
            ("/drop/input/any/01.2.3.4", Address(text("01.2.3.4"))),
            ("/drop/input/any/1.2.3.4%2f24", Address(text("1.2.3.4%2f24"))),
            ("/drop/input/any/0.0.0.0", AnyAddress),
            ("/drop/output/any/::", AnyAddress),
            ("/drop/input/any/0.0.0.0/32", Address(text("0.0.0.0"))),
            ("/drop/forward/any/::/128", Address(text("::"))),
            ("/drop/input/any/1.2.3.4/8", Mask(text("8"))),
            ("/drop/input/any/1.2.3.4/33", Mask(text("33"))),
            ("/drop/input/any/1.2.3.4/024", Mask(text("024"))),
            ("/drop/input/any/1.2.3.4/300", Mask(text("300"))),
            ("/drop/input/any/0.0.0.0/0", Mask(text("0"))),
            ("/drop/input/any/2001:db8::/16", Mask(text("16"))),
            ("/drop/input/any/2001:db8::/129", Mask(text("129"))),
            ("/drop/forward/any/1.2.3.4/any/::1", Families),
        ];
        for (path, error) in table {
            assert_eq!(path.parse::<Rule>(), Err(error), "{path}");
        }
    }

    #[test]
    fn overlapping_rules() {
        let table = [
            ("/drop/input/any/1.2.3.4", "/accept/input/eth0/1.2.3.0/24", true),
            ("/drop/input/eth1/1.2.3.4", "/accept/input/eth0/1.2.3.0/24", false),
            ("/drop/input/eth/1.2.3.4", "/accept/input/eth0/1.2.3.4", true),
            ("/drop/input/eth/1.2.3.4", "/accept/input/e/1.2.3.4", true),
            ("/drop/input/any/1.2.3.4", "/accept/output/any/1.2.3.4", false),
            ("/drop/forward/any/1.2.3.4", "/drop/forward/any/0.0.0.0/any/5.6.7.8", true),
            ("/drop/forward/any/1.2.3.4", "/drop/forward/any/::/any/5::", false),
        ];
        for (a, b, overlap) in table {
            let (a, b): (Rule, Rule) = (a.parse().expect(a), b.parse().expect(b));
            assert_eq!((a.overlaps(&b), b.overlaps(&a)), (overlap, overlap), "{a} {b}");
        }
    }
}
