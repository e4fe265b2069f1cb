//! This host's current addresses and interfaces.
//!
//! They are read from `/proc/self/net`, which `ProcSubset=pid` does not hide.

use crate::log::Log;
use crate::rule::net::{Family, Net};
use crate::rule::{Iface, Rule};
use std::fs::File;
use std::io::{Error, ErrorKind, Read, Result};
use std::net::{Ipv4Addr, Ipv6Addr, UdpSocket};

/// The IPv4 routes, including one to each address of this host. Some router kernels lack this file.
const ROUTES: &str = "/proc/self/net/fib_trie";
/// One line per IPv6 address of this host. A kernel without IPv6 lacks this file.
const ADDRESSES_V6: &str = "/proc/self/net/if_inet6";
const INTERFACES: &str = "/proc/self/net/dev";
/// The most bytes to read from a file: 18,000 routes of [`ROUTES`]. The kernel walks all routes
/// again for every 4 KiB, which takes 0.03 s for that many and minutes for a full Internet table.
const MAX_FILE: u64 = 2 << 20;
/// No host has this address (RFC 1112, section 4).
const NOBODY: Ipv4Addr = Ipv4Addr::new(240, 0, 0, 1);
/// Enough for most hosts in one read(2), each of which starts from the first route again.
const READ_SIZE: usize = 8 << 10;

/// This host's addresses of a rule's family. For IPv4: none if each address of the rule is a single
/// one of another host; if the kernel does not list them, those of the rule to which a socket can be
/// bound.
pub fn own_addresses(rule: &Rule, log: &Log) -> Vec<Net> {
    let is_v4 = rule.family() == Family::V4;
    // For a second after it was added, no socket can be bound to an IPv6 address (RFC 4862, 5.4).
    if is_v4 && rule.addresses().all(|net| is_bindable(&net) == Some(false)) {
        return Vec::new();
    }
    list(rule.family(), log).unwrap_or_else(|| {
        let is_reliable = is_v4 && is_bindable(&Net::host(NOBODY.into())) == Some(false);
        rule.addresses().filter(|net| is_reliable && is_bindable(net) == Some(true)).collect()
    })
}

/// Whether a socket can be bound to an address: only to this host's (bind(2), EADDRNOTAVAIL).
/// Takes under 10 us, however many routes there are. With `ip_nonlocal_bind`, every address is
/// bindable. `None` for a block or a multicast group, or if no socket can be created.
fn is_bindable(net: &Net) -> Option<bool> {
    let is_one = net.is_host() && !net.addr().is_multicast();
    match UdpSocket::bind((is_one.then_some(net.addr())?, 0)) {
        Ok(_) => Some(true),
        Err(error) if error.kind() == ErrorKind::AddrNotAvailable => Some(false),
        Err(_) => None,
    }
}

/// All addresses of this host that the kernel lists.
pub fn list_addresses(log: &Log) -> Vec<Net> {
    Family::ALL.into_iter().filter_map(|family| list(family, log)).flatten().collect()
}

/// `None`, with a WARNING, if the kernel does not list them.
fn list(family: Family, log: &Log) -> Option<Vec<Net>> {
    let result = match family {
        Family::V4 => read(ROUTES).map(|text| own_v4(&text)),
        Family::V6 => read(ADDRESSES_V6).map(|text| own_v6(&text)),
    };
    match result {
        Ok(nets) => Some(nets),
        Err(error) if family == Family::V6 && error.kind() == ErrorKind::NotFound => {
            Some(Vec::new())
        }
        Err(error) => {
            log.warning(format_args!(
                "cannot list all of this host's addresses, so only white.list protects the others: \
                 {error}"
            ));
            None
        }
    }
}

/// Whether root is an ordinary user of the host, as in a rootless container. A kernel without user
/// namespaces lacks this file.
pub fn is_rootless() -> bool {
    read("/proc/self/uid_map").is_ok_and(|map| !map.contains("4294967295"))
}

/// A note if this host lacks one of the interfaces that a rule names.
pub fn missing_interface(named: [Iface; 2]) -> Option<String> {
    let mut named = named.into_iter().filter(|iface| *iface != Iface::ANY).peekable();
    named.peek()?;
    let text = read(INTERFACES).ok()?;
    let missing = named.find(|iface| !interfaces(&text).any(|name| iface.matches(name)))?;
    let missing = missing.to_string();
    let problem = match missing.strip_suffix('+') {
        Some(start) => format!("no interface has a name that starts with '{start}'"),
        None => format!("no interface is named '{missing}'"),
    };
    Some(format!("At present {problem}; the change has no effect until there is one."))
}

/// The interface names in lines such as `  eth0: 0 0 ...`.
fn interfaces(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter_map(|line| line.split_once(':')).map(|(name, _)| name.trim())
}

fn read(path: &str) -> Result<String> {
    let mut text = String::with_capacity(READ_SIZE);
    let with_path = |error: Error| Error::new(error.kind(), format!("{path}: {error}"));
    let mut file = File::open(path).map_err(with_path)?.take(MAX_FILE);
    file.read_to_string(&mut text).map_err(with_path)?;
    match file.limit() {
        0 => Err(Error::new(ErrorKind::FileTooLarge, format!("{path}: too many routes"))),
        _ => Ok(text),
    }
}

/// Reads leaves such as `|-- 192.0.2.1`, each followed by its routes: `/32 host LOCAL`. A local
/// route to a wider block, as for TPROXY, is not an address.
fn own_v4(routes: &str) -> Vec<Net> {
    let mut nets = Vec::new();
    let mut leaf: Option<Ipv4Addr> = None;
    for line in routes.lines().map(str::trim) {
        if let Some(address) = line.strip_prefix("|-- ") {
            leaf = address.parse().ok();
        } else if line.starts_with("/32 ") && line.ends_with(" LOCAL") {
            nets.extend(leaf.map(|address| Net::host(address.into())));
        }
    }
    nets
}

/// Reads lines that begin with the address as 32 hexadecimal digits.
fn own_v6(addresses: &str) -> Vec<Net> {
    let digits = addresses.lines().filter_map(|line| line.split_once(' '));
    let bits = digits.filter_map(|(digits, _)| u128::from_str_radix(digits, 16).ok());
    bits.map(|bits| Net::host(Ipv6Addr::from_bits(bits).into())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(nets: &[Net]) -> String {
        nets.iter().map(Net::to_string).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn routes_to_own_addresses() {
        let text = "\
Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 0.0.0.0
        /0 universe UNICAST
     +-- 10.1.0.0/29 2 0 2
        |-- 10.1.0.0
           /24 link UNICAST
        |-- 10.1.0.5
           /32 host LOCAL
     |-- 10.1.0.255
        /32 link BROADCAST
Local:
  +-- 127.0.0.0/31 1 0 0
     |-- 127.0.0.0
        /8 host LOCAL
     |-- 127.0.0.1
        /32 host LOCAL
Id 100:
  |-- 0.0.0.0
     /0 host LOCAL
";
        assert_eq!(shown(&own_v4(text)), "10.1.0.5 127.0.0.1");
        assert_eq!(shown(&own_v4("/32 host LOCAL\n|-- x\n/32 host LOCAL\n")), "");
    }

    #[test]
    fn own_ipv6_addresses() {
        let text = "\
fe80000000000000585979fffe46747b 03 40 20 c0       d0
00000000000000000000000000000001 01 80 10 80       lo
x 1
";
        assert_eq!(shown(&own_v6(text)), "fe80::5859:79ff:fe46:747b ::1");
    }

    #[test]
    fn this_host() {
        let loopback = Net::parse("127.0.0.1").unwrap();
        let log = Log::default();
        assert!(list_addresses(&log).contains(&loopback));
        let table = [
            ("any", "any", ""),
            ("lo", "any", ""),
            ("any", "l", ""),
            ("eht9", "lo", "no interface is named 'eht9'"),
            ("lo", "nosuch", "no interface has a name that starts with 'nosuch'"),
        ];
        for (one, two, problem) in table {
            let named = [one, two].map(|name| Iface::parse(name).unwrap());
            let missing = missing_interface(named).unwrap_or_default();
            let is_right = missing.contains(problem) && missing.is_empty() == problem.is_empty();
            assert!(is_right, "{missing}");
        }
        assert!(interfaces("Inter-| x\n face |y\n  lo: 1 2\neth0.5: 3\n").eq(["lo", "eth0.5"]));
        assert_eq!(is_bindable(&loopback), Some(true));
        for (net, expected) in
            [("203.0.113.0/24", None), ("224.0.0.251", None), ("240.0.0.1", Some(false))]
        {
            assert_eq!(is_bindable(&Net::parse(net).unwrap()), expected, "{net}");
        }
        let own = |path: &str| own_addresses(&path.parse().unwrap(), &log);
        assert!(own("/drop/input/any/127.0.0.1").contains(&loopback));
        assert_eq!(own("/drop/input/any/240.0.0.1"), []);
        let error = read("/proc/self/net/none").unwrap_err();
        assert!(error.to_string().starts_with("/proc/self/net/none: "), "{error}");
        // An endless file.
        assert_eq!(read("/dev/zero").unwrap_err().kind(), ErrorKind::FileTooLarge);
    }
}
