//! Path and query to a command: a rule that parses has one path that parses to it, names nothing
//! wider than a path may, and becomes a line of iptables that reads back as it was written.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rfw::api::{Command, Grammar, allow};
use rfw::firewall::iptables::{KernelRule, RuleEdit, TaggedRule, parse_row};
use rfw::http::request::Request;
use rfw::rule::net::{Family, Net};
use rfw::rule::rights::Rights;
use rfw::rule::{Action, Rule, RuleTemplate, WIDEST_V4, WIDEST_V6};

/// Method, body and configuration are in the first byte.
fn parse(bits: u8, target: &str) -> Option<Command> {
    let method = ["GET", "PUT", "DELETE", "POST"][usize::from(bits & 3)];
    let length = bits >> 2 & 1;
    let head = format!("{method} {target} HTTP/1.1\r\nHost: h\r\nContent-Length: {length}\r\n\r\n");
    let request = Request::parse(head.as_bytes()).ok()?;
    let (non_restful, sets) = (bits & 8 > 0, bits & 16 > 0);
    let grammar = Grammar { default_expire: 7, non_restful, sets, ipv6: true };
    let command = Command::parse(&request, grammar).ok()?;
    let changes = match command {
        Command::Change(_, intent) | Command::ChangeAll(_, intent, _) => {
            allow(intent, &Rights::All).ok()?;
            true
        }
        _ => false,
    };
    // GET changes nothing, unless the configuration and the client both say so.
    assert!(!changes || method != "GET" || (grammar.non_restful && target.contains("modify=")));
    assert!(method != "POST");
    Some(command)
}

fuzz_target!(|input: (u8, &str)| {
    let (bits, target) = input;
    match parse(bits, target) {
        Some(Command::Change(rule, intent)) => {
            let (action, tag) = (intent.action, intent.tag);
            check(Rule { tag, ..rule });
            let tag = match action {
                Action::DeleteAnyTag => "&tag=*".into(),
                _ => tag.to_string().replace('@', "&tag="),
            };
            let query = match action {
                Action::Put(seconds) => format!("expire={seconds}"),
                _ => "wait=true".into(),
            };
            let method = if matches!(action, Action::Put(_)) { 1 } else { 2 };
            let again = parse(method | bits & 16, &format!("{rule}?{query}{tag}"));
            assert_eq!(again, Some(Command::Change(rule, intent)));
        }
        Some(Command::ChangeAll(template, ..)) => {
            let net = Net::parse("192.0.2.7").expect("an address");
            let rule = template.rule(net);
            check(rule);
            assert_eq!(rule.template(), Some((template, net)));
            let path = rule.to_string();
            let segments: Vec<&str> = path.split('/').skip(1).take(3).collect();
            assert_eq!(RuleTemplate::parse(&segments), Ok(template));
        }
        _ => {}
    }
});

fn check(rule: Rule) {
    assert_eq!(rule.to_string().parse(), Ok(rule));
    for net in rule.addresses() {
        let widest = if net.family() == Family::V4 { WIDEST_V4 } else { WIDEST_V6 };
        assert!(net.prefix() >= widest && net.family() == rule.family());
    }
    let tagged = TaggedRule::new(KernelRule::plain(rule), Some(1));
    let line = RuleEdit::Insert(1, tagged).to_string();
    let plain = |b: u8| b.is_ascii_alphanumeric() || b" .:/+-_@".contains(&b);
    assert!(line.bytes().all(plain), "{line}");
    let listed = line.replacen("-I ", "-A ", 1);
    assert_eq!(parse_row(&listed, rule.family()), Some((rule.chain(), Some(tagged))));
}
