//! `ipset save`: an entry writes back as it was read.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rfw::firewall::ipset::{SetEntry, parse_entry};

fuzz_target!(|text: &str| {
    for entry in text.lines().filter_map(parse_entry) {
        let SetEntry { net, timeout, counters: (packets, bytes) } = entry;
        let line = format!("add s {net} timeout {timeout} packets {packets} bytes {bytes}\n");
        assert_eq!(parse_entry(&line), Some(entry));
    }
});
