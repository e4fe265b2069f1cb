//! What a rule is: pure values, no input or output.
//!
//! A rule has one text form, its API path, parsed by [`Rule::parse`] and written
//! by `Display`:
//!
//! ```text
//! rule   = ( "/" target "/" ( "input" / "output" ) "/" iface "/" block
//!        / "/" target "/forward/" iface "/" block [ "/" iface [ "/" block ] ] ) [ "@" tag ]
//! target = "drop" / "accept" / "reject"          ; any letter case, like chains
//! block  = address [ "/" prefix ]
//! iface  = "any" / name [ "+" ]
//! ```
//!
//! In a request, the tag is in the query instead. A rule with one address consists of a
//! [`RuleTemplate`] and that address.

pub mod interval;
pub mod list;
pub mod net;
pub mod rights;
pub mod tag;
pub mod whitelist;

use net::{Family, Net, parse_prefix};
use std::fmt;
use std::net::IpAddr;
use std::slice::Iter;
use std::str::FromStr;
use tag::Tag;

/// The shortest prefixes that a rule may name: wider blocks could lock out half
/// the world by mistake.
pub const WIDEST_V4: u8 = 9;
pub const WIDEST_V6: u8 = 17;

/// The shortest prefix of a family.
pub fn widest(family: Family) -> u8 {
    if family == Family::V4 { WIDEST_V4 } else { WIDEST_V6 }
}

/// What happens to a packet, in the order of set rules.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Target {
    Accept,
    Reject,
    Drop,
}

impl Target {
    pub const ALL: [Target; 3] = [Target::Accept, Target::Reject, Target::Drop];

    /// The name that iptables uses; the API accepts it in any letter case.
    pub fn name(self) -> &'static str {
        match self {
            Target::Drop => "DROP",
            Target::Accept => "ACCEPT",
            Target::Reject => "REJECT",
        }
    }
}

/// A built-in chain of the filter table.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Chain {
    Input,
    Forward,
    Output,
}

impl Chain {
    /// In the order in which iptables lists them.
    pub const ALL: [Chain; 3] = [Chain::Input, Chain::Forward, Chain::Output];

    /// The name that iptables uses; the API accepts it in any letter case.
    pub fn name(self) -> &'static str {
        match self {
            Chain::Input => "INPUT",
            Chain::Forward => "FORWARD",
            Chain::Output => "OUTPUT",
        }
    }

    pub fn parse(name: &str) -> Option<Chain> {
        Chain::ALL.into_iter().find(|chain| chain.name().eq_ignore_ascii_case(name))
    }
}

/// The interfaces that a rule matches, as iptables names them: `eth0` is one,
/// `ppp+` is all that start with `ppp`, the empty name is all. At most 15 bytes
/// (IFNAMSIZ without the NUL) of `[A-Za-z0-9._@-]` and the `+`: no quoting needed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Iface([u8; 15]);

impl Iface {
    pub const ANY: Iface = Iface([0; 15]);

    /// Parses a path segment. A name that does not end in a digit is a prefix,
    /// with or without `+`.
    pub fn parse(text: &str) -> Option<Iface> {
        match text {
            "any" => Some(Iface::ANY),
            // Probably meant as every interface; no interface has such a name.
            _ if text.eq_ignore_ascii_case("any") || text.eq_ignore_ascii_case("all") => None,
            _ if text.ends_with('+') || text.ends_with(|c: char| c.is_ascii_digit()) => {
                Iface::named(text)
            }
            _ => Iface::named(&format!("{text}+")),
        }
    }

    /// Whether it matches the interface of this name.
    pub fn matches(&self, name: &str) -> bool {
        let text = self.to_string();
        match text.strip_suffix('+') {
            Some(start) => name.starts_with(start),
            None => *self == Iface::ANY || text == name,
        }
    }

    fn named(text: &str) -> Option<Iface> {
        let stem = text.strip_suffix('+').unwrap_or(text);
        let allowed = |b: u8| b.is_ascii_alphanumeric() || b"._@-".contains(&b);
        if stem.is_empty() || stem.starts_with(['-', '.']) || !stem.bytes().all(allowed) {
            return None;
        }
        let mut iface = Iface::ANY;
        iface.0.get_mut(..text.len())?.copy_from_slice(text.as_bytes());
        Some(iface)
    }
}

/// As iptables writes it, and `any` for all interfaces.
impl fmt::Display for Iface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.0.split(|b| *b == 0).next().unwrap_or_default();
        f.write_str(std::str::from_utf8(name).ok().filter(|name| !name.is_empty()).unwrap_or("any"))
    }
}

/// The packets that a rule matches: exactly the fields that its chain has.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Match {
    Input {
        iface: Iface,
        source: Net,
    },
    Output {
        iface: Iface,
        destination: Net,
    },
    /// Both blocks have the same family.
    Forward {
        in_iface: Iface,
        out_iface: Iface,
        source: Net,
        destination: Net,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Rule {
    pub target: Target,
    pub matches: Match,
    pub tag: Tag,
}

/// The address of a packet that a template's block is compared with.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Side {
    Source,
    Destination,
}

/// A rule without its one address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct RuleTemplate {
    pub target: Target,
    pub chain: Chain,
    /// Incoming and outgoing interface; [`Iface::ANY`] where the chain has none.
    pub in_iface: Iface,
    pub out_iface: Iface,
    /// Always the source in INPUT, the destination in OUTPUT.
    pub side: Side,
    pub tag: Tag,
}

impl RuleTemplate {
    /// Parses the segments of a path that ends at the interface.
    pub fn parse(segments: &[&str]) -> Result<RuleTemplate, RuleError> {
        let mut rest = segments.iter();
        let template = take_template(&mut rest)?;
        match segments {
            [target, chain, name] if name.parse::<IpAddr>().is_ok() => {
                Err(RuleError::NoIface(format!("/{target}/{chain}/any/{name}")))
            }
            [target, chain, name] if is_file_name(name) => {
                Err(RuleError::FileName(format!("/{target}/{chain}/any")))
            }
            [_, _, _] => Ok(template),
            _ => Err(RuleError::Shape),
        }
    }

    /// The rule for one block, or for any address.
    pub fn rule(self, net: Net) -> Rule {
        let RuleTemplate { target, chain, in_iface, out_iface, side, tag } = self;
        let any = Net::any(net.family());
        let matches = match (chain, side) {
            (Chain::Input, _) => Match::Input { iface: in_iface, source: net },
            (Chain::Output, _) => Match::Output { iface: out_iface, destination: net },
            (_, Side::Source) => {
                Match::Forward { in_iface, out_iface, source: net, destination: any }
            }
            (_, Side::Destination) => {
                Match::Forward { in_iface, out_iface, source: any, destination: net }
            }
        };
        Rule { target, matches, tag }
    }

    /// The same template with each of the other targets.
    pub fn others(self) -> impl Iterator<Item = RuleTemplate> {
        let others = Target::ALL.into_iter().filter(move |target| *target != self.target);
        others.map(move |target| RuleTemplate { target, ..self })
    }
}

/// What a change does with its rules.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Insert or refresh them, to expire after this many seconds; 0 means never.
    Put(u64),
    /// The same, and delete all others with their tag in this template. For lists only.
    Replace(u64),
    Delete,
    /// Delete them whatever their tag.
    DeleteAnyTag,
}

impl Action {
    /// The seconds after which the rules expire; `None` if they are deleted.
    pub fn expire(self) -> Option<u64> {
        match self {
            Action::Put(seconds) | Action::Replace(seconds) => Some(seconds),
            Action::Delete | Action::DeleteAnyTag => None,
        }
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Rules {
    One(Rule),
    /// One for each block; the blocks are sorted and unique.
    List(RuleTemplate, Vec<Net>),
    /// All existing rules with a tag, in one chain or in all.
    Tagged(Tag, Option<Chain>),
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Change {
    pub rules: Rules,
    pub action: Action,
}

impl Change {
    /// The family of a single rule; `None` for a list, which may have rules of both and is
    /// applied as a whole or not at all.
    pub fn family(&self) -> Option<Family> {
        match &self.rules {
            Rules::One(rule) => Some(rule.family()),
            Rules::List(..) | Rules::Tagged(..) => None,
        }
    }

    /// Whether rules of a family may change.
    pub fn concerns(&self, family: Family) -> bool {
        match &self.rules {
            Rules::One(rule) => rule.family() == family,
            Rules::List(..) if matches!(self.action, Action::Replace(_)) => true,
            Rules::List(_, nets) => nets.iter().any(|net| net.family() == family),
            Rules::Tagged(..) => true,
        }
    }
}

/// Which rules are requested; `None` matches all.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Filter {
    pub chain: Option<Chain>,
    pub tag: Option<Tag>,
    /// A block that overlaps an address of the rule.
    pub net: Option<Net>,
}

impl Filter {
    pub fn admits(&self, rule: &Rule) -> bool {
        let overlaps = |net: Net| rule.addresses().any(|address| address.overlaps(&net));
        self.covers(rule.chain(), rule.tag) && self.net.is_none_or(overlaps)
    }

    /// Whether it selects rules of this chain with this tag, addresses aside.
    pub fn covers(&self, chain: Chain, tag: Tag) -> bool {
        self.chain.is_none_or(|wanted| wanted == chain)
            && self.tag.is_none_or(|wanted| wanted == tag)
    }
}

/// Why a path does not name a rule. The text is the invalid segment.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RuleError {
    /// An unknown target or chain.
    Unknown,
    /// Too few or too many segments.
    Shape,
    Iface(String),
    /// `all` or, in a list, an address in place of the interface; the text is the path with `any`.
    NoIface(String),
    /// In a list, a file name; the text is the path without it.
    FileName(String),
    Address(String),
    /// "Any address" outside FORWARD.
    AnyAddress,
    /// No address in FORWARD.
    NoAddress,
    /// Addresses of two families in one rule.
    Families,
    /// An invalid prefix length; the text is the address and the mask.
    Mask(String),
    /// A block wider than a rule may name.
    Wide(Net),
    /// In a list, an invalid range.
    Range(String),
    /// In a list, a line that is too long.
    Long,
}

impl Rule {
    /// Parses the segments of a path without a tag.
    pub fn parse(segments: &[&str]) -> Result<Rule, RuleError> {
        let mut rest = segments.iter();
        let template = take_template(&mut rest)?;
        let block = take_block(template.chain, &mut rest)?;
        let mut rule = template.rule(block);
        match &mut rule.matches {
            Match::Forward { out_iface, destination, .. } => {
                if rest.len() > 0 {
                    *out_iface = take_iface(&mut rest)?;
                }
                if rest.len() > 0 {
                    *destination = take_block(template.chain, &mut rest)?;
                }
                if destination.family() != block.family() {
                    return Err(RuleError::Families);
                }
            }
            _ if block.is_any() => return Err(RuleError::AnyAddress),
            _ => {}
        }
        if rest.len() > 0 { Err(RuleError::Shape) } else { Ok(rule) }
    }

    /// The template and the address of a rule that names exactly one.
    pub fn template(&self) -> Option<(RuleTemplate, Net)> {
        let (source, destination) = self.sides();
        match (source.is_any(), destination.is_any()) {
            (false, true) => Some((self.template_of(Side::Source), source)),
            (true, false) => Some((self.template_of(Side::Destination), destination)),
            _ => None,
        }
    }

    /// All its parts but the addresses.
    pub fn template_of(&self, side: Side) -> RuleTemplate {
        let (in_iface, out_iface) = self.ifaces();
        let (target, chain, tag) = (self.target, self.chain(), self.tag);
        RuleTemplate { target, chain, in_iface, out_iface, side, tag }
    }

    /// Whether a path can name it, unlike some rules that the kernel may list.
    pub fn is_wellformed(&self) -> bool {
        let named = self.chain() == Chain::Forward || self.addresses().next().is_some();
        named && self.addresses().all(|net| is_narrow(&net))
    }

    pub fn chain(&self) -> Chain {
        match self.matches {
            Match::Input { .. } => Chain::Input,
            Match::Output { .. } => Chain::Output,
            Match::Forward { .. } => Chain::Forward,
        }
    }

    pub fn family(&self) -> Family {
        self.sides().0.family()
    }

    /// Incoming and outgoing interface.
    pub fn ifaces(&self) -> (Iface, Iface) {
        match self.matches {
            Match::Input { iface, .. } => (iface, Iface::ANY),
            Match::Output { iface, .. } => (Iface::ANY, iface),
            Match::Forward { in_iface, out_iface, .. } => (in_iface, out_iface),
        }
    }

    /// Source and destination.
    pub fn sides(&self) -> (Net, Net) {
        match self.matches {
            Match::Input { source, .. } => (source, Net::any(source.family())),
            Match::Output { destination, .. } => (Net::any(destination.family()), destination),
            Match::Forward { source, destination, .. } => (source, destination),
        }
    }

    /// The blocks that it names, without "any address".
    pub fn addresses(&self) -> impl Iterator<Item = Net> {
        <[Net; 2]>::from(self.sides()).into_iter().filter(|net| !net.is_any())
    }

    /// Whether both rules can match the same packet, interfaces aside.
    pub fn overlaps(&self, other: &Rule) -> bool {
        let ((from, to), (other_from, other_to)) = (self.sides(), other.sides());
        self.chain() == other.chain() && from.overlaps(&other_from) && to.overlaps(&other_to)
    }
}

/// Whether it is a block that a rule may name.
fn is_narrow(net: &Net) -> bool {
    net.prefix() >= widest(net.family()) && !net.is_unspecified()
}

fn take_template(rest: &mut Iter<'_, &str>) -> Result<RuleTemplate, RuleError> {
    let target = rest.next().ok_or(RuleError::Shape)?;
    let known = Target::ALL.into_iter().find(|t| t.name().eq_ignore_ascii_case(target));
    let target = known.ok_or(RuleError::Unknown)?;
    let chain = rest.next().ok_or(RuleError::Shape)?;
    let chain = Chain::parse(chain).ok_or(RuleError::Unknown)?;
    if rest.as_slice().first().is_some_and(|name| name.eq_ignore_ascii_case("all")) {
        let path = format!("/{}/{}/any", target.name(), chain.name());
        return Err(RuleError::NoIface(path.to_ascii_lowercase()));
    }
    let iface = take_iface(rest)?;
    let (in_iface, out_iface, side) = match chain {
        Chain::Output => (Iface::ANY, iface, Side::Destination),
        _ => (iface, Iface::ANY, Side::Source),
    };
    Ok(RuleTemplate { target, chain, in_iface, out_iface, side, tag: Tag::NONE })
}

fn take_iface(rest: &mut Iter<'_, &str>) -> Result<Iface, RuleError> {
    let text = rest.next().ok_or(RuleError::Shape)?;
    Iface::parse(text).ok_or_else(|| RuleError::Iface(text.to_string()))
}

/// Takes an address and the prefix length that may follow. In FORWARD, an
/// interface may follow instead, so only a number is a prefix length. Without
/// one, `0.0.0.0` and `::` mean "any address"; as single hosts, they are invalid.
fn take_block(chain: Chain, rest: &mut Iter<'_, &str>) -> Result<Net, RuleError> {
    let text = rest.next().ok_or(RuleError::Shape)?;
    let invalid = || RuleError::Address(text.to_string());
    let host = Net::host(text.parse::<IpAddr>().map_err(|_| invalid())?);
    let mask = rest.as_slice().first().filter(|next| chain != Chain::Forward || is_number(next));
    let Some(mask) = mask else {
        return Ok(if host.is_unspecified() { Net::any(host.family()) } else { host });
    };
    rest.next();
    let net = parse_prefix(mask).and_then(|prefix| Net::new(host.addr(), prefix));
    match net.ok_or_else(|| RuleError::Mask(format!("{text}/{mask}")))? {
        net if net.is_unspecified() => Err(invalid()),
        net if !is_narrow(&net) => Err(RuleError::Wide(net)),
        net => Ok(net),
    }
}

/// Whether a segment looks like a file name, which `curl -T FILE URL/` appends to the URL: a letter
/// follows its last dot. VLANs such as eth0.5 have dots, too; a final + marks an interface.
fn is_file_name(name: &str) -> bool {
    let extension = name.rsplit_once('.').map_or("", |(_, extension)| extension);
    !name.ends_with('+') && extension.contains(|c: char| c.is_ascii_alphabetic())
}

/// Decimal digits, at least one, and nothing else.
pub fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

impl FromStr for Rule {
    type Err = RuleError;

    fn from_str(path: &str) -> Result<Rule, RuleError> {
        // An interface name may contain an @, too, but a tag follows an address.
        let is_tagged = path.rsplit('/').next().and_then(|segment| segment.split_once('@'));
        let is_tagged =
            is_tagged.is_some_and(|(block, _)| is_number(block) || block.parse::<IpAddr>().is_ok());
        let split = if is_tagged { Tag::split(path) } else { Some((path, Tag::NONE)) };
        let (path, tag) = split.ok_or(RuleError::Shape)?;
        let path = path.strip_prefix('/').ok_or(RuleError::Shape)?;
        Ok(Rule { tag, ..Rule::parse(&path.split('/').collect::<Vec<_>>())? })
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // In a path, "any address" has no prefix.
        let block = |net: Net| match net.is_any() {
            true => net.addr().to_string(),
            false => net.to_string(),
        };
        let (target, chain) = (self.target.name(), self.chain().name());
        let start = format!("/{target}/{chain}").to_ascii_lowercase();
        match self.matches {
            Match::Input { iface, source: net } | Match::Output { iface, destination: net } => {
                write!(f, "{start}/{iface}/{}", block(net))?;
            }
            Match::Forward { in_iface, out_iface, source, destination } => {
                write!(f, "{start}/{in_iface}/{}", block(source))?;
                // An interface named `24` would be read as a prefix length unless one precedes it.
                if source.is_host() && is_number(&out_iface.to_string()) {
                    write!(f, "/{}", source.prefix())?;
                }
                // A tag directly after an interface would be read as part of its name.
                let has_at = self.tag != Tag::NONE || out_iface.to_string().contains('@');
                match (out_iface, destination.is_any()) {
                    (Iface::ANY, true) => {}
                    (_, true) if !has_at => write!(f, "/{out_iface}")?,
                    _ => write!(f, "/{out_iface}/{}", block(destination))?,
                }
            }
        }
        write!(f, "{}", self.tag)
    }
}

#[cfg(test)]
impl Rules {
    /// The rules that are named individually.
    pub fn iter(&self) -> impl Iterator<Item = Rule> {
        let (one, template, nets) = match self {
            Rules::One(rule) => (Some(*rule), None, &[][..]),
            Rules::List(template, nets) => (None, Some(*template), nets.as_slice()),
            Rules::Tagged(..) => (None, None, &[][..]),
        };
        one.into_iter().chain(nets.iter().filter_map(move |net| Some(template?.rule(*net))))
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
            ("/drop/input/all+/1.2.3.4", "/drop/input/all+/1.2.3.4"),
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
            ("/drop/input/any/1.2.3.4@feed", "/drop/input/any/1.2.3.4@feed"),
            ("/drop/input/e@x1/2001:db8::/64@a.b_c-1", "/drop/input/e@x1/2001:db8::/64@a.b_c-1"),
            ("/drop/forward/any/1.2.3.4@feed", "/drop/forward/any/1.2.3.4@feed"),
            ("/drop/forward/any/1.2.3.4/24@feed", "/drop/forward/any/1.2.3.0/24@feed"),
            ("/drop/forward/any/1.2.3.4/e@x1", "/drop/forward/any/1.2.3.4/e@x1/0.0.0.0"),
            (
                "/drop/forward/any/1.2.3.4/32/24@x1/0.0.0.0",
                "/drop/forward/any/1.2.3.4/24@x1/0.0.0.0",
            ),
            ("/drop/forward/any/::1/e0/::@x1", "/drop/forward/any/::1/e0/::@x1"),
            ("/drop/forward/any/::/any/::1/99@feed", "/drop/forward/any/::/any/::/99@feed"),
        ];
        for (path, canonical) in table {
            let rule: Rule = path.parse().expect(path);
            assert_eq!(rule.to_string(), canonical, "{path}");
            assert_eq!(canonical.parse(), Ok(rule), "{canonical}");
        }
    }

    #[test]
    fn invalid_paths() {
        use RuleError::*;
        let text = |s: &str| s.to_string();
        let net = |s: &str| Net::parse(s).unwrap();
        let table = [
            ("drop/input/any/1.2.3.4", Shape),
            ("/drop", Shape),
            ("/drop/input", Shape),
            ("/drop/input/any", Shape),
            ("/drop/input/any/1.2.3.4/24/5", Shape),
            ("/drop/forward/any/1.2.3.4/", Iface(text(""))),
            ("/drop/input/any/1.2.3.4/", Mask(text("1.2.3.4/"))),
            ("/drop/input/any/1.2.3.4/-1", Mask(text("1.2.3.4/-1"))),
            ("/drop/forward/any/1.2.3.4/-1", Iface(text("-1"))),
            ("/drop/forward/any/1.2.3.4/any/5.6.7.8/32/x", Shape),
            ("/log/input/any/1.2.3.4", Unknown),
            ("//input/any/1.2.3.4", Unknown),
            ("/drop/prerouting/any/1.2.3.4", Unknown),
            ("/drop/input/+/1.2.3.4", Iface(text("+"))),
            ("/drop/input/ANY/1.2.3.4", Iface(text("ANY"))),
            ("/drop/input/all/1.2.3.4", NoIface(text("/drop/input/any"))),
            ("/Reject/FORWARD/All/1.2.3.4", NoIface(text("/reject/forward/any"))),
            ("/drop/forward/any/1.2.3.4/all", Iface(text("all"))),
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
            ("/drop/input/any/1.2.3.4/8", Wide(net("1.0.0.0/8"))),
            ("/drop/input/any/1.2.3.4/33", Mask(text("1.2.3.4/33"))),
            ("/drop/input/any/1.2.3.4/024", Mask(text("1.2.3.4/024"))),
            ("/drop/input/any/1.2.3.4/300", Mask(text("1.2.3.4/300"))),
            ("/drop/input/any/0.0.0.0/0", Wide(net("0.0.0.0/0"))),
            ("/drop/input/any/2001:db8::/16", Wide(net("2001::/16"))),
            ("/drop/input/any/2001:db8::/129", Mask(text("2001:db8::/129"))),
            ("/drop/forward/any/1.2.3.4/any/::1", Families),
            ("/drop/input/any/1.2.3.4@", Shape),
            ("/drop/input/any/1.2.3.4@Feed", Shape),
            ("/drop/input/any/1.2.3.4/24@a/b", Mask(text("1.2.3.4/24@a"))),
            ("/drop/input/any/1.2.3.4/x@a", Mask(text("1.2.3.4/x@a"))),
        ];
        for (path, error) in table {
            assert_eq!(path.parse::<Rule>(), Err(error), "{path}");
        }
    }

    #[test]
    fn overlapping_rules() {
        let table = [
            ("/drop/input/any/1.2.3.4", "/accept/input/eth0/1.2.3.0/24", true),
            ("/drop/input/eth1/1.2.3.4", "/accept/input/eth0/1.2.3.0/24", true),
            ("/drop/input/any/1.2.3.4", "/accept/output/any/1.2.3.4", false),
            ("/drop/forward/any/1.2.3.4", "/drop/forward/any/0.0.0.0/any/5.6.7.8", true),
            ("/drop/forward/any/1.2.3.4", "/drop/forward/any/::/any/5::", false),
        ];
        for (a, b, overlap) in table {
            let (a, b): (Rule, Rule) = (a.parse().expect(a), b.parse().expect(b));
            assert_eq!((a.overlaps(&b), b.overlaps(&a)), (overlap, overlap), "{a} {b}");
        }
    }

    #[test]
    fn templates() {
        let parse = |path: &str| RuleTemplate::parse(&path.split('/').collect::<Vec<_>>());
        let table = [
            ("drop/input/eth0", "/drop/input/eth0/1.2.3.4"),
            ("Accept/OUTPUT/ppp", "/accept/output/ppp+/1.2.3.4"),
            ("reject/forward/any", "/reject/forward/any/1.2.3.4"),
        ];
        let net = Net::parse("1.2.3.4").unwrap();
        for (path, rule) in table {
            let template = parse(path).unwrap();
            assert_eq!(template.rule(net).to_string(), rule);
            assert_eq!(template.rule(net).template(), Some((template, net)));
            let others: Vec<RuleTemplate> = template.others().collect();
            assert_eq!(others.len(), 2);
            for other in others {
                assert!(other.target != template.target);
                assert_eq!(RuleTemplate { target: template.target, ..other }, template);
            }
        }
        // A forwarded packet's destination.
        let rule: Rule = "/drop/forward/any/0.0.0.0/eth1/1.2.3.4".parse().unwrap();
        let (template, found) = rule.template().unwrap();
        assert_eq!(
            (template.side, template.out_iface.to_string()),
            (Side::Destination, "eth1".into())
        );
        assert_eq!((found, template.rule(net)), (net, rule));
        for path in ["/drop/forward/any/0.0.0.0", "/drop/forward/any/1.2.3.4/any/5.6.7.8"] {
            assert_eq!(path.parse::<Rule>().unwrap().template(), None, "{path}");
        }
        for path in ["drop/input", "drop/input/any/1.2.3.4", "drop/input/any/"] {
            assert_eq!(parse(path), Err(RuleError::Shape), "{path}");
        }
        assert_eq!(parse("drop/nat/any"), Err(RuleError::Unknown));
        for name in ["1.2.3.4", "192.0.2.255"] {
            let path = format!("/drop/input/any/{name}");
            assert_eq!(parse(&format!("drop/input/{name}")), Err(RuleError::NoIface(path)));
        }
        for name in ["feed.txt", "drop_v4.json", "level1.netset", "a.b5", ".txt"] {
            let error = parse(&format!("drop/input/{name}"));
            let path = RuleError::FileName("/drop/input/any".into());
            let is_iface = Iface::parse(name).is_some();
            assert_eq!(error, Err(if is_iface { path } else { RuleError::Iface(name.into()) }));
        }
        for name in ["eth0.5", "feed", "eth0.lan+", "Lan_1.2@x-3", "eth0."] {
            assert_eq!(
                parse(&format!("drop/input/{name}")).is_ok(),
                name != "Lan_1.2@x-3",
                "{name}"
            );
        }
    }

    #[test]
    fn interfaces_match_names() {
        let table = [
            ("eth0", "eth0", true),
            ("eth0", "eth01", false),
            ("ppp", "ppp0", true),
            ("ppp+", "ppp", true),
            ("ppp", "pp", false),
            ("any", "lo", true),
        ];
        for (iface, name, expected) in table {
            assert_eq!(Iface::parse(iface).unwrap().matches(name), expected, "{iface} {name}");
        }
    }

    #[test]
    fn families_of_a_change() {
        let nets = ["1.2.3.4", "2.0.0.0/9", "5::"].map(|net| Net::parse(net).unwrap());
        let template = RuleTemplate::parse(&["drop", "input", "any"]).unwrap();
        let list = |count| Rules::List(template, nets[..count].into());
        let table = [
            (Rules::One(template.rule(nets[0])), Action::Put(0), [true, false]),
            (Rules::One(template.rule(nets[2])), Action::Put(0), [false, true]),
            (list(2), Action::Delete, [true, false]),
            (list(3), Action::Delete, [true, true]),
            (list(2), Action::Replace(0), [true, true]),
            (Rules::Tagged(Tag::NONE, None), Action::Delete, [true, true]),
        ];
        for (rules, action, expected) in table {
            let change = Change { rules, action };
            assert_eq!(Family::ALL.map(|family| change.concerns(family)), expected, "{change:?}");
        }
    }
}
