//! A list reads alike however its bytes are split; what it comes to, written as a list, comes to
//! the same; read leniently it comes to its valid lines; and a line says what the path with that
//! address says, without what is whitelisted.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rfw::rule::list::{List, ListError, ListOptions, ListReport, MAX_LINE};
use rfw::rule::net::{Family, Net};
use rfw::rule::rights::{Intent, Rights};
use rfw::rule::tag::Tag;
use rfw::rule::whitelist::{Sieve, Whitelist};
use rfw::rule::{Action, Rule, RuleTemplate, Rules};
use std::sync::LazyLock;

static WHITELIST: LazyLock<Whitelist> = LazyLock::new(|| {
    Whitelist::parse("10.0.0.0/24\n2001:db8::1\n192.0.2.0/26\n").expect("a white.list")
});
static OWN: LazyLock<[Net; 1]> = LazyLock::new(|| [Net::parse("192.0.2.77").expect("an address")]);
const PLAIN: ListOptions = ListOptions { lenient: false, ipv6: true };

type Outcome = Result<(Vec<Net>, ListReport), ListError>;

fn read(bytes: &[u8], piece: usize, options: ListOptions) -> Outcome {
    let template = RuleTemplate::parse(&["drop", "input", "any"]).expect("a template");
    let intent = Intent { action: Action::Delete, tag: Tag::NONE };
    let allowed = Rights::All.allow(intent).expect("all rights");
    let mut list = List::new(Sieve::new(&WHITELIST, &*OWN, template, allowed), options);
    bytes.chunks(piece).try_for_each(|bytes| list.push(bytes))?;
    let (permitted, report) = list.finish()?;
    match permitted.into_change().rules {
        Rules::List(_, nets) => Ok((nets, report)),
        _ => unreachable!("a list is no single rule"),
    }
}

fn is_free(net: &Net) -> bool {
    WHITELIST.overlapping(net).is_none() && !net.overlaps(&OWN[0])
}

fuzz_target!(|bytes: &[u8]| {
    let outcome = read(bytes, usize::MAX, PLAIN);
    for piece in [1, 2, 7, 64, 1023] {
        assert_eq!(read(bytes, piece, PLAIN), outcome);
    }
    let lenient = read(bytes, 64, ListOptions { lenient: true, ..PLAIN });
    match &outcome {
        Ok((nets, _)) => {
            assert!(nets.is_sorted_by(|a, b| a < b) && nets.iter().all(is_free));
            let text: String = nets.iter().map(|net| format!("{net}\n")).collect();
            match read(text.as_bytes(), 64, PLAIN) {
                Ok((again, report)) => {
                    assert_eq!((&again, report.whitelisted_count), (nets, 0));
                }
                Err(error) => assert!(error == ListError::Empty && nets.is_empty()),
            }
            assert_eq!(&lenient.expect("no line is invalid").0, nets);
            let v4 = ListOptions { ipv6: false, ..PLAIN };
            let v4 = read(bytes, 64, v4).expect("the same lines").0;
            assert!(v4.iter().eq(nets.iter().filter(|net| net.family() == Family::V4)));
        }
        Err(ListError::Invalid(invalid)) => {
            assert!(0 < invalid.count && invalid.count <= invalid.entries);
            assert_eq!(lenient.is_ok(), 2 * invalid.count <= invalid.entries);
        }
        Err(error) => assert_eq!(&lenient, &Err(error.clone())),
    }
    if !bytes.iter().any(|byte| b"\r\n".contains(byte)) {
        single(bytes, &outcome);
    }
});

fn single(line: &[u8], outcome: &Outcome) {
    let line = line.strip_prefix("\u{feff}".as_bytes()).unwrap_or(line);
    let end = (0..line.len()).find(|at| {
        let rest = &line[*at..];
        b"#;".contains(&rest[0]) || rest.starts_with(b"//")
    });
    let entry = &line[..end.unwrap_or(line.len())];
    let Ok(text) = str::from_utf8(entry).map(|text| text.trim_matches([' ', '\t'])) else { return };
    if text.is_empty() || text.contains('-') || entry.len() > MAX_LINE {
        return;
    }
    let rule = format!("/drop/input/any/{text}").parse::<Rule>();
    let Some((_, net)) = rule.ok().and_then(|rule| rule.template()) else {
        return assert!(matches!(outcome, Err(ListError::Invalid(_))));
    };
    let (nets, report) = outcome.as_ref().expect("one line");
    assert_eq!(nets == &[net], is_free(&net));
    assert_eq!(report.whitelisted_count, usize::from(!is_free(&net)));
    assert!(nets.iter().all(|piece| net.contains(piece)));
}
