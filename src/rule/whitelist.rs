//! Addresses that nobody may lock out, and that alone may talk to the
//! outward server.

use super::net::Net;
use super::rights::Allowed;
use super::{Chain, Change, Rule, Rules};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The whitelist: what `white.list` names, and the loopback addresses.
#[derive(Debug)]
pub struct Whitelist {
    nets: Vec<Net>,
}

/// A change that its user may make and that touches no whitelisted address. Only
/// [`Whitelist::permit`] and a sifted list make one, out of what [`Allowed`] shows, and the
/// firewall takes nothing else.
#[derive(Debug)]
pub struct Permitted(Change);

impl Permitted {
    /// Of a list, each line of which was looked at.
    pub(super) fn sifted(rules: Rules, allowed: Allowed) -> Permitted {
        Permitted(allowed.change(rules))
    }

    /// The rules that rfw keeps touch no whitelisted address.
    pub fn delete_tag(allowed: Allowed, chain: Option<Chain>) -> Permitted {
        Permitted(allowed.change(Rules::Tagged(allowed.tag(), chain)))
    }

    pub fn into_change(self) -> Change {
        self.0
    }
}

/// A line of a file that is wrong, or the file as a whole.
#[derive(PartialEq, Eq, Debug)]
pub struct LineError {
    /// Counted from 1; 0 where no single line is to blame.
    pub line: usize,
    /// What is wrong and what to do.
    pub message: String,
}

impl Whitelist {
    /// Reads one entry a line: an address, a CIDR block or `FIRST-LAST`;
    /// blank lines and lines that start with `#` count for nothing.
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
                    "'{entry}' is no entry; write an address, a CIDR block such as 10.0.0.0/8, \
                     or a range such as 10.0.0.1-10.0.0.9"
                ),
            })?;
            if blocks.iter().any(Net::is_any) {
                let message = format!("'{entry}' is every address: nothing could be blocked");
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
        // A block sorts before those that it contains, and stands for them.
        nets.sort();
        nets.dedup_by(|net, before| before.contains(net));
        Ok(Whitelist { nets })
    }

    pub fn nets(&self) -> &[Net] {
        &self.nets
    }

    /// Whether a peer may talk to the outward server.
    pub fn admits(&self, peer: IpAddr) -> bool {
        self.overlapping(&Net::host(peer)).is_some()
    }

    /// The first of the whitelisted blocks that share an address with this one.
    /// They are sorted and apart from each other, so at most the last one before
    /// it contains it, and the next one is the first that it contains.
    pub fn overlapping(&self, net: &Net) -> Option<Net> {
        let (before, behind) = self.nets.split_at(self.nets.partition_point(|w| w < net));
        [before.last(), behind.first()].into_iter().flatten().find(|w| w.overlaps(net)).copied()
    }

    /// The whitelisted block that one of a rule's addresses overlaps.
    pub fn conflict(&self, rule: &Rule) -> Option<Net> {
        rule.addresses().find_map(|net| self.overlapping(&net))
    }

    /// Lets the change of a rule pass, or names the whitelisted block that it
    /// overlaps. A list is sifted line by line instead.
    pub fn permit(&self, rule: Rule, allowed: Allowed) -> Result<Permitted, Net> {
        match self.conflict(&rule) {
            None => Ok(Permitted(allowed.change(Rules::One(rule)))),
            Some(net) => Err(net),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rule::Action;
    use crate::rule::rights::{Intent, Rights};
    use crate::rule::tag::Tag;

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
        let intent = Intent { action: Action::Delete, tag: Tag::NONE };
        let allowed = Rights::All.allow(intent).unwrap();
        for (path, conflict) in table {
            let net = list.permit(path.parse().unwrap(), allowed).err().map(|net| net.to_string());
            assert_eq!(net.as_deref(), conflict, "{path}");
        }
        assert!(list.admits("::ffff:10.1.9.9".parse().unwrap()));
        assert!(!list.admits("10.2.0.1".parse().unwrap()));
    }
}
