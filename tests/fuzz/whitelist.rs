//! white.list: a plain reading of it takes the same files, and refuses the same rules.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rfw::rule::net::Net;
use rfw::rule::rights::{Intent, Rights};
use rfw::rule::tag::Tag;
use rfw::rule::whitelist::Whitelist;
use rfw::rule::{Action, Rule};
use std::net::IpAddr;

/// First and last address, both of one family.
type Range = (IpAddr, IpAddr);

fn number(addr: IpAddr) -> (u128, u32) {
    match addr {
        IpAddr::V4(v4) => (u32::from(v4).into(), 32),
        IpAddr::V6(v6) => (v6.into(), 128),
    }
}

fn block(addr: IpAddr, prefix: u32) -> Option<Range> {
    let (number, width) = number(addr);
    let host = u128::MAX.checked_shl(width.checked_sub(prefix)?).map_or(u128::MAX, |mask| !mask);
    let (first, last) = (number & !host, number | host);
    Some(match width {
        32 => (IpAddr::V4((first as u32).into()), IpAddr::V4((last as u32).into())),
        _ => (IpAddr::V6(first.into()), IpAddr::V6(last.into())),
    })
}

fn address(text: &str) -> Option<IpAddr> {
    text.trim().parse::<IpAddr>().ok().map(|addr| addr.to_canonical())
}

fn entry(text: &str) -> Option<Range> {
    let range = match (text.split_once('-'), text.split_once('/')) {
        (Some((first, last)), _) => (address(first)?, address(last)?),
        (_, Some((addr, prefix))) => {
            let digits = prefix.parse::<u8>().ok().filter(|n| n.to_string() == prefix)?;
            block(address(addr).filter(|_| addr.trim() == addr)?, digits.into())?
        }
        _ => block(address(text)?, number(address(text)?).1)?,
    };
    let every = block(range.0, 0)?;
    let fits = range.0.is_ipv4() == range.1.is_ipv4() && range.0 <= range.1;
    (fits && range != every).then_some(range)
}

fn plain(text: &str) -> Option<Vec<Range>> {
    let entries = text.lines().map(|line| line.split('#').next().unwrap_or_default().trim());
    let ranges = entries.filter(|entry| !entry.is_empty()).map(entry);
    ranges.collect::<Option<Vec<_>>>().filter(|ranges| !ranges.is_empty())
}

fuzz_target!(|text: &str| {
    // The first line is what is asked for.
    let (asked, text) = text.split_once('\n').unwrap_or_default();
    let parsed = Whitelist::parse(text);
    let Some(mut ranges) = plain(text) else {
        let line = parsed.expect_err("a plain reader refuses it").line;
        return assert!(line <= text.lines().count());
    };
    let list = parsed.expect("a plain reader takes it");
    ranges.extend(["127.0.0.0/8", "::1"].map(|text| entry(text).expect("loopback")));
    for pair in list.nets().windows(2) {
        assert!(pair[0] < pair[1] && !pair[0].overlaps(&pair[1]));
    }
    let meets = |(first, last): Range| {
        let same = |range: &&Range| range.0.is_ipv4() == first.is_ipv4();
        ranges.iter().filter(same).any(|range| range.0 <= last && first <= range.1)
    };
    // Where a block of IPv6 has room for mapped addresses, those are IPv4 all the same.
    let ends = ranges.iter().flat_map(|range| [range.0, range.1]);
    for end in ends.filter(|end| end.to_canonical() == *end) {
        assert!(list.admits(end));
    }
    let Some(net) = Net::parse(asked) else { return };
    let (addr, prefix) = (net.addr(), net.prefix());
    let overlaps = meets(block(addr, prefix.into()).expect("a block"));
    assert_eq!(list.overlapping(&net).is_some(), overlaps);
    assert_eq!(list.admits(addr), meets((addr, addr)));
    let paths = [
        "/drop/input/any/",
        "/accept/output/eth0/",
        "/reject/forward/a/",
        "/drop/forward/any/0.0.0.0/any/",
    ];
    for path in paths {
        let Ok(rule) = format!("{path}{addr}/{prefix}").parse::<Rule>() else { continue };
        let intent = Intent { action: Action::Delete, tag: Tag::NONE };
        let allowed = Rights::All.allow(intent).expect("all rights");
        assert_eq!(list.permit(rule, allowed, &[]).is_err(), overlaps);
    }
});
