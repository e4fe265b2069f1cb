//! A list reads alike however its bytes are split; what it comes to, written as a list, comes to
//! the same, and a line says what the path with that address says.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rfw::rule::list::{LeftOut, List, MAX_LINE, TooMany, Wrong};
use rfw::rule::net::Net;
use rfw::rule::rights::{Allowed, Intent, Rights};
use rfw::rule::tag::Tag;
use rfw::rule::whitelist::Whitelist;
use rfw::rule::{Action, Rule, RuleTemplate, Rules};
use std::sync::LazyLock;

static WHITELIST: LazyLock<Whitelist> = LazyLock::new(|| {
    Whitelist::parse("10.0.0.0/24\n2001:db8::1\n192.0.2.0/26\n").expect("a white.list")
});

type Outcome = Result<Result<(Vec<Net>, LeftOut), Wrong>, TooMany>;

fn read(bytes: &[u8], piece: usize) -> Outcome {
    let mut list = List::new(&WHITELIST);
    bytes.chunks(piece).try_for_each(|bytes| list.push(bytes))?;
    let template = RuleTemplate::parse(&["drop", "input", "any"]).expect("a template");
    let read = list.finish(template, allowed())?;
    Ok(read.map(|(permitted, left_out)| match permitted.into_change().rules {
        Rules::List(_, nets) => (nets, left_out),
        _ => unreachable!("a list is no single rule"),
    }))
}

fuzz_target!(|bytes: &[u8]| {
    let outcome = read(bytes, usize::MAX);
    for piece in [1, 2, 7, 64, 1023] {
        assert_eq!(read(bytes, piece), outcome);
    }
    if let Ok(Ok((nets, _))) = &outcome {
        assert!(nets.is_sorted_by(|a, b| a < b));
        assert!(nets.iter().all(|net| WHITELIST.overlapping(net).is_none()));
        let text: String = nets.iter().map(|net| format!("{net}\n")).collect();
        let again = read(text.as_bytes(), 64).expect("as many").expect("no line is wrong");
        assert_eq!((&again.0, again.1.count), (nets, 0));
    }
    let lines: Vec<&[u8]> = bytes.split(|byte| *byte == b'\n').collect();
    if let [line] = *lines {
        single(line, &outcome);
    }
});

fn single(line: &[u8], outcome: &Outcome) {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let entry = line.split(|byte| b"#;".contains(byte)).next().unwrap_or_default();
    let Ok(text) = str::from_utf8(entry).map(|text| text.trim_matches([' ', '\t'])) else { return };
    if text.is_empty() || text.contains('-') || entry.len() > MAX_LINE {
        return;
    }
    let rule = format!("/drop/input/any/{text}").parse::<Rule>();
    let net = rule.ok().and_then(|rule| rule.template()).map(|(_, net)| net);
    let read = outcome.as_ref().expect("one line").as_ref().ok();
    let read = read.map(|(nets, left_out)| (nets.clone(), left_out.lines.clone()));
    assert_eq!(
        read,
        net.map(|net| match WHITELIST.overlapping(&net) {
            Some(_) => (vec![], vec![net.to_string()]),
            None => (vec![net], vec![]),
        })
    );
}

/// That everybody who may do everything may delete.
fn allowed() -> Allowed {
    let intent = Intent { action: Action::Delete, tag: Tag::NONE };
    Rights::All.allow(intent).expect("all rights")
}
