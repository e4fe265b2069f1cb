//! Heads parse alike however they are split; what is accepted says the same when it is written
//! anew, and another reader, httparse, takes it for the same request.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rfw::http::request::{Body, MAX_FIELDS, MAX_HEAD, Request, head_length};

fuzz_target!(|bytes: &[u8]| {
    let whole = head_length(bytes);
    let mut decided = false;
    for end in (0..=bytes.len()).step_by(1 + bytes.len() / 1000) {
        let verdict = head_length(&bytes[..end]);
        assert!(if decided { verdict == whole } else { verdict == Ok(None) || verdict == whole });
        decided = verdict != Ok(None);
    }
    let Ok(Some(length)) = whole else { return };
    let head = &bytes[..length];
    assert!(length <= MAX_HEAD && head.ends_with(b"\r\n\r\n"));
    let Ok(request) = Request::parse(head) else { return };
    assert_eq!(
        head.iter().filter(|b| **b == b'\r').count(),
        head.split(|b| *b == b'\n').count() - 1
    );
    let text = write(&request);
    assert_eq!(head_length(&text), Ok(Some(text.len())));
    assert_eq!(Request::parse(&text).as_ref(), Ok(&request));
    compare(head, &request);
});

/// The same request in other words.
fn write(request: &Request) -> Vec<u8> {
    let mut text = format!("{} HTTP/1.{}\r\n", request.line(), u8::from(request.http11));
    let mut field = |name: &str, value: &str| text += &format!("{name}:{value}\r\n");
    field("connection", if request.keep_alive { "keep-alive" } else { "close" });
    request.host.iter().for_each(|host| field("host", host));
    request.authorization.iter().for_each(|value| field("authorization", value));
    match request.body {
        Body::Length(length) => field("content-length", &length.to_string()),
        Body::Chunked => field("transfer-encoding", "chunked"),
    }
    if request.expects_continue {
        field("expect", "100-continue");
    }
    text += "\r\n";
    text.chars().map(|c| u8::try_from(c).expect("a character is a byte")).collect()
}

fn compare(head: &[u8], request: &Request) {
    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let mut other = httparse::Request::new(&mut fields);
    match other.parse(head) {
        // It knows no HTTP/1.2 to 1.9.
        Err(httparse::Error::Version) => return,
        status => assert_eq!(status, Ok(httparse::Status::Complete(head.len()))),
    }
    assert_eq!(other.method, Some(&*request.method));
    assert_eq!(other.version, Some(u8::from(request.http11)));
    let target = other.path.unwrap_or_default();
    let line = request.line();
    let (_, own) = line.split_once(' ').unwrap_or_default();
    assert!(target.ends_with(own.trim_start_matches('/')), "{target} {own}");
    let value = |name: &str| {
        let mut all = other.headers.iter().filter(|field| field.name.eq_ignore_ascii_case(name));
        let value = all.next().map(|field| field.value);
        assert!(all.next().is_none(), "{name} twice");
        value
    };
    let latin1 = |text: &String| text.chars().map(|c| c as u8).collect::<Vec<u8>>();
    assert_eq!(
        value("authorization").map(<[u8]>::to_vec),
        request.authorization.as_ref().map(latin1)
    );
    if target.starts_with(['/', '*']) {
        assert_eq!(value("host").map(<[u8]>::to_vec), request.host.as_ref().map(latin1));
    }
    match (request.body, value("content-length"), value("transfer-encoding")) {
        (Body::Length(0), None, None) => {}
        (Body::Length(length), Some(digits), None) => {
            let digits = std::str::from_utf8(digits).expect("digits");
            assert_eq!(digits.parse().unwrap_or(u64::MAX), length);
        }
        (Body::Chunked, None, Some(coding)) => assert!(coding.eq_ignore_ascii_case(b"chunked")),
        other => panic!("{other:?}"),
    }
}
