//! What this host has at the moment: addresses and interfaces.
//!
//! The files are those of the process, `/proc/self/net`, which `ProcSubset=pid` does not hide.

use crate::rule::Iface;
use crate::rule::net::Net;
use std::fs::File;
use std::io::{Error, ErrorKind, Read, Result};
use std::net::{Ipv4Addr, Ipv6Addr, UdpSocket};

/// The routes of IPv4, among them one to each own address. Some kernels for routers lack it.
const ROUTES: &str = "/proc/self/net/fib_trie";
/// A line for each own address of IPv6. A kernel without IPv6 lacks it.
const ADDRESSES_V6: &str = "/proc/self/net/if_inet6";
const INTERFACES: &str = "/proc/self/net/dev";
/// The most that is read of a file, in bytes; of [`ROUTES`], 18,000 routes. The kernel walks all
/// routes again for every 4 KiB, which takes 0.03 s for so many and minutes for all of the Internet.
const MAX_FILE: u64 = 2 << 20;
/// Room for what most hosts have: each read(2) starts from the first route again.
const READ_SIZE: usize = 8 << 10;

/// The own addresses that matter for these blocks; for none, all. If the kernel does not list its
/// addresses, those among the blocks to which a socket can be bound.
pub fn own_addresses(blocks: &[Net]) -> Vec<Net> {
    let mut possible: Vec<_> = blocks.iter().map(|net| (*net, is_bindable(net))).collect();
    possible.retain(|(_, is_bindable)| *is_bindable != Some(false));
    if possible.is_empty() && !blocks.is_empty() {
        return Vec::new();
    }
    possible.retain(|(_, is_bindable)| is_bindable.is_some());
    list_addresses().unwrap_or_else(|_| possible.into_iter().map(|(net, _)| net).collect())
}

/// Whether a socket can be bound to an address: to that of another host it cannot (bind(2),
/// EADDRNOTAVAIL). This takes under 10 us, however many routes there are. Where `ip_nonlocal_bind`
/// is on, every address looks like an own one. `None` for a block, and if no socket can be made.
fn is_bindable(net: &Net) -> Option<bool> {
    match UdpSocket::bind((net.is_host().then_some(net.addr())?, 0)) {
        Ok(_) => Some(true),
        Err(error) if error.kind() == ErrorKind::AddrNotAvailable => Some(false),
        Err(_) => None,
    }
}

/// All addresses that the kernel lists as this host's.
pub fn list_addresses() -> Result<Vec<Net>> {
    let mut nets = own_v4(&read(ROUTES)?);
    match read(ADDRESSES_V6) {
        Ok(text) => nets.extend(own_v6(&text)),
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    Ok(nets)
}

/// A sentence about an interface that a rule names and this host does not have, if there is one.
pub fn missing_interface(named: [Iface; 2]) -> Option<String> {
    let mut named = named.into_iter().filter(|iface| *iface != Iface::ANY).peekable();
    named.peek()?;
    let text = read(INTERFACES).ok()?;
    let missing = named.find(|iface| !interfaces(&text).any(|name| iface.is_about(name)))?;
    let missing = missing.to_string();
    let what = match missing.strip_suffix('+') {
        Some(start) => format!("no interface has a name that starts with '{start}'"),
        None => format!("no interface is named '{missing}'"),
    };
    Some(format!("At present {what}: until there is one, this has no effect."))
}

/// Reads lines such as `  eth0: 0 0 ...`, each with the name of an interface.
fn interfaces(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter_map(|line| line.split_once(':')).map(|(name, _)| name.trim())
}

fn read(path: &str) -> Result<String> {
    let mut text = String::with_capacity(READ_SIZE);
    let in_file = |error: Error| Error::new(error.kind(), format!("{path}: {error}"));
    let mut file = File::open(path).map_err(in_file)?.take(MAX_FILE);
    file.read_to_string(&mut text).map_err(in_file)?;
    match file.limit() {
        0 => Err(Error::new(ErrorKind::FileTooLarge, format!("{path}: too many routes"))),
        _ => Ok(text),
    }
}

/// Reads leaves such as `|-- 192.0.2.1`, each with its routes below it: `/32 host LOCAL`. A local
/// route to a wider block, as for TPROXY, is no address.
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
    fn addresses_of_ipv6() {
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
        assert!(list_addresses().unwrap().contains(&loopback));
        let table = [
            ("any", "any", ""),
            ("lo", "any", ""),
            ("any", "l", ""),
            ("eht9", "lo", "no interface is named 'eht9'"),
            ("lo", "nosuch", "no interface has a name that starts with 'nosuch'"),
        ];
        for (one, two, what) in table {
            let named = [one, two].map(|name| Iface::parse(name).unwrap());
            let missing = missing_interface(named).unwrap_or_default();
            assert!(missing.contains(what) && missing.is_empty() == what.is_empty(), "{missing}");
        }
        assert!(interfaces("Inter-| x\n face |y\n  lo: 1 2\neth0.5: 3\n").eq(["lo", "eth0.5"]));
        assert_eq!(is_bindable(&loopback), Some(true));
        assert_eq!(is_bindable(&Net::parse("203.0.113.0/24").unwrap()), None);
        let error = read("/proc/self/net/none").unwrap_err();
        assert!(error.to_string().starts_with("/proc/self/net/none: "), "{error}");
        // It never ends.
        assert_eq!(read("/dev/zero").unwrap_err().kind(), ErrorKind::FileTooLarge);
    }
}
