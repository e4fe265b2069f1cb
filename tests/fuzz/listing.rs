//! `iptables -S`: what is ours writes back as it was read, and with one option more is not ours.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rfw::firewall::ipset::set_name;
use rfw::firewall::iptables::{RuleEdit, RuleKind, parse_row};
use rfw::rule::net::Family;

fuzz_target!(|text: &str| {
    for (line, family) in text.lines().flat_map(|line| Family::ALL.map(|family| (line, family))) {
        let Some((chain, row)) = parse_row(line, family) else { continue };
        assert!(line.starts_with(&format!("-A {} ", chain.name())));
        let Some(tagged) = row else { continue };
        assert_eq!(tagged.rule.rule.chain(), chain);
        let written = RuleEdit::Insert(1, tagged).to_string().replacen("-I ", "-A ", 1);
        assert_eq!(parse_row(&written, family), Some((chain, Some(tagged))), "{written}");
        let plain = |b: u8| b.is_ascii_alphanumeric() || b" .:/+-_@~".contains(&b);
        assert!(written.bytes().all(plain), "{written}");
        assert_eq!(
            tagged.expires.is_some(),
            line.contains("rfw:") && tagged.rule.kind == RuleKind::Plain
        );
        let line = line.trim_end();
        assert_eq!(parse_row(&format!("{line} --uid-owner 0"), family), Some((chain, None)));
        assert_eq!(parse_row(&format!("{line} -m mark"), family), Some((chain, None)));
        if let Some(template) = tagged.rule.template() {
            let name = set_name(&template, tagged.rule.rule.family());
            assert!(line.contains(&name) && name.len() <= 31);
        }
    }
});
