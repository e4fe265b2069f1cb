//! Address blocks, IPv4 and IPv6, always in canonical form.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The two address families, each with its own kernel tables.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    /// Both, in the order in which they are listed.
    pub const ALL: [Family; 2] = [Family::V4, Family::V6];

    /// The length of an address in bits.
    pub fn width(self) -> u8 {
        if self == Family::V4 { 32 } else { 128 }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Family::V4 { "IPv4" } else { "IPv6" })
    }
}

/// A CIDR block. Host bits are zero and an IPv4-mapped IPv6 address
/// (RFC 4291, 2.5.5.2) is the IPv4 address, so equal blocks compare equal.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Net {
    addr: IpAddr,
    prefix: u8,
}

impl Net {
    /// The block of `prefix` bits around `addr`; `None` if the prefix is
    /// longer than the address.
    pub fn new(addr: IpAddr, prefix: u8) -> Option<Net> {
        let addr = addr.to_canonical();
        let host_bits = family_of(addr).width().checked_sub(prefix)?;
        let kept = number(addr) & !low_bits(host_bits);
        Some(Net { addr: address(family_of(addr), kept), prefix })
    }

    pub fn host(addr: IpAddr) -> Net {
        let addr = addr.to_canonical();
        Net { addr, prefix: family_of(addr).width() }
    }

    /// The block of all addresses of a family.
    pub fn any(family: Family) -> Net {
        Net { addr: address(family, 0), prefix: 0 }
    }

    /// Parses `ADDRESS` or `ADDRESS/PREFIX` (RFC 4632 and 4291).
    pub fn parse(text: &str) -> Option<Net> {
        match text.split_once('/') {
            None => Some(Net::host(text.parse().ok()?)),
            Some((addr, prefix)) => Net::new(addr.parse().ok()?, parse_prefix(prefix)?),
        }
    }

    /// Parses `FIRST-LAST` into the fewest blocks that make up this range, both ends included;
    /// `None` if they have different families or the wrong order.
    pub fn parse_range(text: &str) -> Option<Vec<Net>> {
        let (first, last) = text.split_once('-')?;
        let first = first.trim().parse::<IpAddr>().ok()?.to_canonical();
        let last = last.trim().parse::<IpAddr>().ok()?.to_canonical();
        let family = family_of(first);
        if family != family_of(last) || first > last {
            return None;
        }
        let end = number(last);
        let mut next = Some(number(first));
        let mut nets = Vec::new();
        while let Some(start) = next.filter(|start| *start <= end) {
            let left = end.saturating_sub(start).checked_add(1);
            let bits = start.trailing_zeros().min(left.map_or(u128::BITS, u128::ilog2)) as u8;
            let bits = bits.min(family.width());
            nets.extend(Net::new(address(family, start), family.width().saturating_sub(bits)));
            next = (start | low_bits(bits)).checked_add(1);
        }
        Some(nets)
    }

    /// What counts as one client: an IPv6 host can use every address of its /64 (RFC 8981).
    pub fn source(ip: IpAddr) -> Net {
        match ip {
            IpAddr::V4(_) => Net::host(ip),
            IpAddr::V6(_) => Net::new(ip, 64).unwrap_or(Net::host(ip)),
        }
    }

    pub fn family(&self) -> Family {
        family_of(self.addr)
    }

    /// How many leading bits its addresses share.
    pub fn prefix(&self) -> u8 {
        self.prefix
    }

    /// The block's first address.
    pub fn addr(&self) -> IpAddr {
        self.addr
    }

    pub fn is_host(&self) -> bool {
        self.prefix == self.family().width()
    }

    /// Whether it is `0.0.0.0` or `::`, the address of no host.
    pub fn is_unspecified(&self) -> bool {
        self.is_host() && self.addr.is_unspecified()
    }

    /// Whether it is all addresses of its family.
    pub fn is_any(&self) -> bool {
        self.prefix == 0
    }

    /// Whether every address of `other` is in this block.
    pub fn contains(&self, other: &Net) -> bool {
        self.prefix <= other.prefix && Net::new(other.addr, self.prefix) == Some(*self)
    }

    /// Its two halves; none for a single address.
    pub fn halves(&self) -> impl Iterator<Item = Net> {
        let (family, first) = (self.family(), number(self.addr));
        let last = first | low_bits(family.width().saturating_sub(self.prefix));
        let prefix = self.prefix.saturating_add(1);
        let middle = last & !low_bits(family.width().saturating_sub(prefix));
        [first, middle].into_iter().filter_map(move |half| Net::new(address(family, half), prefix))
    }

    /// Whether the blocks share an address: then one contains the other.
    pub fn overlaps(&self, other: &Net) -> bool {
        self.contains(other) || other.contains(self)
    }
}

/// As iptables shows it: a single address has no prefix.
impl fmt::Display for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_host() {
            return self.addr.fmt(f);
        }
        write!(f, "{}/{}", self.addr, self.prefix)
    }
}

/// Parses a prefix length: decimal digits, no sign, no leading zero.
pub fn parse_prefix(text: &str) -> Option<u8> {
    let plain = text == "0" || !text.starts_with(['0', '+']);
    text.parse().ok().filter(|_| plain)
}

fn family_of(addr: IpAddr) -> Family {
    if addr.is_ipv4() { Family::V4 } else { Family::V6 }
}

fn number(addr: IpAddr) -> u128 {
    match addr {
        IpAddr::V4(v4) => u128::from(v4.to_bits()),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

fn address(family: Family, number: u128) -> IpAddr {
    match family {
        // The number came from 32 bits, so the mask changes nothing.
        Family::V4 => IpAddr::V4(Ipv4Addr::from_bits((number & 0xffff_ffff) as u32)),
        Family::V6 => IpAddr::V6(Ipv6Addr::from_bits(number)),
    }
}

fn low_bits(count: u8) -> u128 {
    !u128::MAX.checked_shl(u32::from(count)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv6_host_is_one_source() {
        for (ip, expected) in [
            ("192.0.2.7", "192.0.2.7"),
            ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
            ("2001:db8:1:2::", "2001:db8:1:2::/64"),
            ("::1", "::/64"),
        ] {
            assert_eq!(Net::source(ip.parse().unwrap()).to_string(), expected);
        }
    }

    fn show(text: &str) -> String {
        Net::parse(text).map_or("none".into(), |net| net.to_string())
    }

    #[test]
    fn one_block_has_one_form() {
        let table = [
            ("1.2.3.4", "1.2.3.4"),
            ("1.2.3.4/32", "1.2.3.4"),
            ("7.7.7.77/24", "7.7.7.0/24"),
            ("7.7.7.77/0", "0.0.0.0/0"),
            ("2001:DB8:0:0::1", "2001:db8::1"),
            ("2001:db8::ffff/32", "2001:db8::/32"),
            ("2001:db8::1/128", "2001:db8::1"),
            ("::ffff:1.2.3.4", "1.2.3.4"),
            ("::ffff:1.2.3.4/24", "1.2.3.0/24"),
            ("::ffff:1.2.3.4/120", "none"),
            ("::/0", "::/0"),
            ("1.2.3.4/33", "none"),
            ("::1/129", "none"),
            ("1.2.3.4/", "none"),
            ("1.2.3.4/+8", "none"),
            ("1.2.3.4/08", "none"),
            ("1.2.3.4/ 8", "none"),
            ("01.2.3.4", "none"),
            ("1.2.3", "none"),
            ("1.2.3.4.5", "none"),
            ("fe80::1%eth0", "none"),
            ("", "none"),
        ];
        for (text, canonical) in table {
            assert_eq!(show(text), canonical, "{text}");
        }
    }

    #[test]
    fn containment() {
        let table = [
            ("10.0.0.0/8", "10.1.2.3", true, true),
            ("10.1.2.3", "10.0.0.0/8", false, true),
            ("10.0.0.0/9", "10.128.0.0/9", false, false),
            ("0.0.0.0/0", "::/0", false, false),
            ("::/0", "2001:db8::1", true, true),
            ("1.2.3.4", "1.2.3.4", true, true),
        ];
        for (a, b, contains, overlaps) in table {
            let (a, b) = (Net::parse(a).unwrap(), Net::parse(b).unwrap());
            assert_eq!((a.contains(&b), a.overlaps(&b)), (contains, overlaps), "{a} {b}");
        }
    }

    #[test]
    fn halves() {
        let table = [
            ("10.0.0.0/8", "10.0.0.0/9 10.128.0.0/9"),
            ("10.0.0.6/31", "10.0.0.6 10.0.0.7"),
            ("10.0.0.6", ""),
            ("0.0.0.0/0", "0.0.0.0/1 128.0.0.0/1"),
            ("::/0", "::/1 8000::/1"),
            ("2001:db8::1", ""),
            // The other half is IPv4, another family.
            ("::fffe:0:0/95", "::fffe:0:0/96"),
        ];
        for (net, halves) in table {
            let shown: Vec<_> = Net::parse(net).unwrap().halves().map(|n| n.to_string()).collect();
            assert_eq!(shown.join(" "), halves, "{net}");
        }
    }

    /// The last address of ::/80 is ::ffff:255.255.255.255.
    #[test]
    fn the_half_before_the_ipv4_mapped_addresses_is_not_lost() {
        let halves: Vec<_> = Net::parse("::/80").unwrap().halves().collect();
        assert_eq!(halves, ["::/81", "::8000:0:0/81"].map(|net| Net::parse(net).unwrap()));
    }

    #[test]
    fn ranges_become_the_fewest_blocks() {
        let table = [
            ("10.0.0.1", "10.0.0.1", "10.0.0.1"),
            ("10.0.0.0", "10.0.0.255", "10.0.0.0/24"),
            ("10.0.0.1", "10.0.0.6", "10.0.0.1 10.0.0.2/31 10.0.0.4/31 10.0.0.6"),
            ("0.0.0.0", "255.255.255.255", "0.0.0.0/0"),
            ("255.255.255.254", "255.255.255.255", "255.255.255.254/31"),
            ("::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "::/0"),
            ("2001:db8::1", "2001:db8::2", "2001:db8::1 2001:db8::2"),
            ("10.0.0.2", "10.0.0.1", "none"),
            ("10.0.0.2", "::1", "none"),
        ];
        for (first, last, expected) in table {
            let nets = Net::parse_range(&format!("{first}-{last}"));
            let text = nets.map_or("none".into(), |nets| {
                nets.iter().map(Net::to_string).collect::<Vec<_>>().join(" ")
            });
            assert_eq!(text, expected, "{first}-{last}");
        }
    }
}
