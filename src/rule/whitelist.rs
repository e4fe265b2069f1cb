//! Addresses that no change may lock out, and that alone may connect to the
//! outward server.

use super::net::Net;
use super::rights::Allowed;
use super::{Action, Chain, Change, Rule, RuleTemplate, Rules, Target};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

/// The entries of `white.list`, and the loopback addresses.
#[derive(Debug)]
pub struct Whitelist {
    nets: Vec<Net>,
}

/// The protected block that a change overlaps: an entry of the whitelist, or this host's address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Conflict {
    Whitelisted(Net),
    Own(Net),
}

/// A change that its user may make, that overlaps no whitelisted address, and that blocks none of
/// this host's own. Made of an [`Allowed`] action by [`Whitelist::permit`], [`Sieve::permit`] or
/// [`Permitted::delete_tag`]. The firewall accepts nothing else.
#[derive(Debug)]
pub struct Permitted(Change);

impl Permitted {
    /// Deletes all rules with a tag, none of which overlaps the whitelist.
    pub fn delete_tag(allowed: Allowed, chain: Option<Chain>) -> Permitted {
        Permitted(allowed.change(Rules::Tagged(allowed.tag(), chain)))
    }

    pub fn into_change(self) -> Change {
        self.0
    }
}

/// Cuts protected addresses out of the blocks of a list.
#[derive(Debug)]
pub struct Sieve {
    protected: Whitelist,
    template: RuleTemplate,
    allowed: Allowed,
    nets: Vec<Net>,
}

impl Sieve {
    /// PUT and DELETE have the same holes, so that a DELETE finds what the list's PUT inserted.
    pub fn new(
        whitelist: &Whitelist,
        own: &[Net],
        template: RuleTemplate,
        allowed: Allowed,
    ) -> Sieve {
        let mut nets = whitelist.nets.clone();
        if template.target != Target::Accept {
            nets.extend(own);
        }
        Sieve { protected: Whitelist::new(nets), template, allowed, nets: Vec::new() }
    }

    /// Adds the fewest blocks that make up this one without its holes; returns whether it has any.
    pub fn add(&mut self, net: Net) -> bool {
        let Some(hole) = self.protected.overlapping(&net) else {
            // No host has the addresses 0.0.0.0 and ::, and no rule may name them.
            self.nets.extend(Some(net).filter(|net| !net.is_unspecified()));
            return false;
        };
        if !hole.contains(&net) {
            for half in net.halves() {
                self.add(half);
            }
        }
        true
    }

    /// Whether rules that the list does not name are deleted.
    pub fn replaces(&self) -> bool {
        matches!(self.allowed.action(), Action::Replace(_))
    }

    pub fn count(&self) -> usize {
        self.nets.len()
    }

    /// The change of all blocks, without duplicates.
    pub fn permit(mut self) -> Permitted {
        self.nets.sort_unstable();
        self.nets.dedup();
        Permitted(self.allowed.change(Rules::List(self.template, self.nets)))
    }
}

/// An error in a file.
#[derive(PartialEq, Eq, Debug)]
pub struct LineError {
    /// Counted from 1; 0 for the file as a whole.
    pub line: usize,
    /// What is wrong and what to do.
    pub message: String,
}

impl LineError {
    /// The error with its file and line.
    pub fn at(&self, file: &Path) -> String {
        let LineError { line, message } = self;
        match line {
            0 => format!("{}: {message}", file.display()),
            _ => format!("{}:{line}: {message}", file.display()),
        }
    }
}

impl Whitelist {
    /// Parses one entry per line: an address, a CIDR block or `FIRST-LAST`.
    /// Blank lines and comments, which start with `#`, are ignored.
    pub fn parse(text: &str) -> Result<Whitelist, LineError> {
        let mut nets = Vec::new();
        for (number, line) in (1..).zip(text.lines()) {
            let entry = line.split('#').next().unwrap_or_default().trim();
            if entry.is_empty() {
                continue;
            }
            let blocks = match entry.contains('-') {
                true => Net::parse_range(entry),
                false => Net::parse(entry).map(|net| vec![net]),
            };
            let blocks = blocks.ok_or_else(|| LineError {
                line: number,
                message: format!(
                    "'{entry}' is not a valid entry; write an address, a CIDR block such as \
                     10.0.0.0/8, or a range such as 10.0.0.1-10.0.0.9"
                ),
            })?;
            if blocks.iter().any(Net::is_any) {
                let message = format!("'{entry}' contains every address: nothing could be blocked");
                return Err(LineError { line: number, message });
            }
            nets.extend(blocks);
        }
        if nets.is_empty() {
            let message = "no entry; name at least the address that you administer from".into();
            return Err(LineError { line: 0, message });
        }
        nets.extend(Net::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8));
        nets.push(Net::host(IpAddr::V6(Ipv6Addr::LOCALHOST)));
        Ok(Whitelist::new(nets))
    }

    /// Keeps only the widest blocks: a block sorts before those that it contains.
    fn new(mut nets: Vec<Net>) -> Whitelist {
        nets.sort();
        nets.dedup_by(|net, before| before.contains(net));
        Whitelist { nets }
    }

    pub fn nets(&self) -> &[Net] {
        &self.nets
    }

    /// Whether a peer may talk to the outward server.
    pub fn admits(&self, peer: IpAddr) -> bool {
        self.overlapping(&Net::host(peer)).is_some()
    }

    /// The first whitelisted block that overlaps this one. They are sorted and
    /// disjoint, so only the last one before it can contain it, and only the
    /// next one can be the first that it contains.
    pub fn overlapping(&self, net: &Net) -> Option<Net> {
        let (before, after) = self.nets.split_at(self.nets.partition_point(|w| w < net));
        [before.last(), after.first()].into_iter().flatten().find(|w| w.overlaps(net)).copied()
    }

    /// The whitelisted block that one of a rule's addresses overlaps.
    pub fn conflict(&self, rule: &Rule) -> Option<Net> {
        rule.addresses().find_map(|net| self.overlapping(&net))
    }

    /// Permits the change of a rule, or names the protected block that it overlaps. Of this host's
    /// own addresses, an ACCEPT blocks none, and a DELETE may unblock one: then they are not asked for.
    pub fn permit(
        &self,
        rule: Rule,
        allowed: Allowed,
        own: impl FnOnce() -> Vec<Net>,
    ) -> Result<Permitted, Conflict> {
        if let Some(net) = self.conflict(&rule) {
            return Err(Conflict::Whitelisted(net));
        }
        let is_own = |own: &Net| rule.addresses().any(|net| net.overlaps(own));
        let is_put = allowed.action().expire().is_some();
        let blocks = rule.target != Target::Accept && is_put;
        match blocks.then(own).into_iter().flatten().find(is_own) {
            None => Ok(Permitted(allowed.change(Rules::One(rule)))),
            Some(net) => Err(Conflict::Own(net)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rule::Action;
    use crate::rule::rights::Rights;

    #[test]
    fn files() {
        let always = "127.0.0.0/8 ::1";
        let table = [
            ("10.0.0.1\n", "10.0.0.1 127.0.0.0/8 ::1"),
            ("# head\n\n 10.0.0.1 # me\r\n10.0.0.1/32\n", "10.0.0.1 127.0.0.0/8 ::1"),
            ("10.0.0.1-10.0.0.2", "10.0.0.1 10.0.0.2 127.0.0.0/8 ::1"),
            ("10.0.0.1 - 10.0.0.1", "10.0.0.1 127.0.0.0/8 ::1"),
            ("2001:db8::5/64", "127.0.0.0/8 ::1 2001:db8::/64"),
            ("127.0.0.0/8", always),
            ("127.0.0.1\n::1", always),
            ("10.9.9.9\n10.0.0.0/8\n10.1.0.0/16", "10.0.0.0/8 127.0.0.0/8 ::1"),
        ];
        for (text, expected) in table {
            let list = Whitelist::parse(text).unwrap();
            let shown: Vec<_> = list.nets().iter().map(Net::to_string).collect();
            assert_eq!(shown.join(" "), expected, "{text}");
        }
        let wrong = [
            ("", 0),
            ("# nothing\n", 0),
            ("10.0.0.1\nhost.example\n", 2),
            ("10.0.0.1 10.0.0.2", 1),
            ("10.0.0.1/33", 1),
            ("10.0.0.2-10.0.0.1", 1),
            ("10.0.0.0/24-10.0.1.0/24", 1),
            ("10.0.0.1\n\n0.0.0.0/0", 3),
            ("0.0.0.0-255.255.255.255", 1),
        ];
        for (text, line) in wrong {
            assert_eq!(Whitelist::parse(text).unwrap_err().line, line, "{text}");
        }
    }

    #[test]
    fn overlap_either_way_is_a_conflict() {
        let list = Whitelist::parse("10.1.0.0/16\n2001:db8::1").unwrap();
        let table = [
            ("/drop/input/any/10.1.2.3", Some("10.1.0.0/16")),
            ("/drop/input/any/10.0.0.0/9", Some("10.1.0.0/16")),
            ("/accept/output/eth0/10.1.2.3", Some("10.1.0.0/16")),
            ("/drop/input/any/127.0.0.1", Some("127.0.0.0/8")),
            ("/drop/input/any/2001:db8::/32", Some("2001:db8::1")),
            ("/drop/forward/any/0.0.0.0/any/10.1.2.3", Some("10.1.0.0/16")),
            ("/drop/forward/any/0.0.0.0", None),
            ("/drop/forward/any/::/any/2001:db8::2", None),
            ("/drop/input/any/10.2.0.0/16", None),
        ];
        for (path, conflict) in table {
            let permitted =
                list.permit(path.parse().unwrap(), Rights::admin(Action::Delete), Vec::new);
            let whitelisted = conflict.map(|net| Conflict::Whitelisted(Net::parse(net).unwrap()));
            assert_eq!(permitted.err(), whitelisted, "{path}");
        }
        assert!(list.admits("::ffff:10.1.9.9".parse().unwrap()));
        assert!(!list.admits("10.2.0.1".parse().unwrap()));
    }

    #[test]
    fn own_addresses_are_never_blocked() {
        let list = Whitelist::parse("10.1.0.0/16").unwrap();
        let own = ["198.18.0.1", "10.1.2.3", "fe80::1"].map(|net| Net::parse(net).unwrap());
        let (put, delete) = (Action::Put(0), Action::Delete);
        let table = [
            ("/drop/input/any/198.18.0.1", put, Some(Conflict::Own(own[0]))),
            ("/reject/output/eth0/198.18.0.0/15", put, Some(Conflict::Own(own[0]))),
            ("/drop/forward/any/1.2.3.4/any/198.18.0.1", put, Some(Conflict::Own(own[0]))),
            ("/drop/output/any/fe80::/64", put, Some(Conflict::Own(own[2]))),
            ("/drop/input/any/198.18.0.1", delete, None),
            ("/accept/input/any/198.18.0.1", put, None),
            ("/drop/input/any/198.18.0.2", put, None),
            ("/drop/forward/any/0.0.0.0/any/1.2.3.4", put, None),
            ("/drop/input/any/10.1.2.3", delete, Some(Conflict::Whitelisted(list.nets[0]))),
        ];
        for (path, action, conflict) in table {
            let permitted =
                list.permit(path.parse().unwrap(), Rights::admin(action), || own.to_vec());
            assert_eq!(permitted.err(), conflict, "{path} {action:?}");
        }
    }

    #[test]
    fn holes() {
        let whitelist = Whitelist::parse("10.0.0.5\n10.0.0.8/30\n0.0.0.1\n2001:db8::/32").unwrap();
        let own = [Net::parse("10.0.0.15").unwrap()];
        let around_5 = "10.0.0.0/30 10.0.0.4 10.0.0.6/31";
        let table = [
            ("drop", "1.2.3.0/24", false, "1.2.3.0/24"),
            ("drop", "10.0.0.5", true, ""),
            ("drop", "10.0.0.8/31", true, ""),
            ("drop", "10.0.0.0/29", true, around_5),
            ("drop", "10.0.0.0/28", true, &format!("{around_5} 10.0.0.12/31 10.0.0.14")),
            ("accept", "10.0.0.0/28", true, &format!("{around_5} 10.0.0.12/30")),
            ("accept", "10.0.0.15", false, "10.0.0.15"),
            ("reject", "0.0.0.0/30", true, "0.0.0.2/31"),
            ("drop", "2001:db8:1::/48", true, ""),
            ("drop", "2001:db8::/30", true, "2001:db9::/32 2001:dba::/31"),
        ];
        for (target, net, has_holes, left) in table {
            let template = RuleTemplate::parse(&[target, "input", "any"]).unwrap();
            let mut sieve = Sieve::new(&whitelist, &own, template, Rights::admin(Action::Put(0)));
            let nets = [Net::parse(net).unwrap()].repeat(2);
            assert!(nets.iter().all(|net| sieve.add(*net) == has_holes), "{target} {net}");
            assert_eq!(sieve.count(), 2 * left.split_whitespace().count());
            let Rules::List(_, nets) = sieve.permit().into_change().rules else {
                panic!("no list")
            };
            let nets: Vec<String> = nets.iter().map(Net::to_string).collect();
            assert_eq!(nets.join(" "), left, "{target} {net}");
        }
        // A /16 with one whitelisted host becomes 16 blocks.
        let template = RuleTemplate::parse(&["drop", "input", "any"]).unwrap();
        let mut sieve = Sieve::new(&whitelist, &own, template, Rights::admin(Action::Put(0)));
        let whitelisted = Whitelist::parse("198.18.7.7").unwrap();
        sieve.protected = whitelisted;
        assert!(sieve.add(Net::parse("198.18.0.0/16").unwrap()));
        assert_eq!(sieve.count(), 16);
    }
}
