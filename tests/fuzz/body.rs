//! A body reads alike however it comes, up to its end and not a byte further.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rfw::http::body;
use rfw::http::api_error::ApiError;
use rfw::http::request::Body;
use std::io::{BufRead, BufReader};

/// The body, or the status of the refusal; and what is left unread.
fn read(bytes: &[u8], piece: usize, body: Body) -> (Result<Vec<u8>, u16>, Vec<u8>) {
    let mut source = BufReader::with_capacity(piece, bytes);
    let mut text = Vec::new();
    let each = |bytes: &[u8]| {
        text.extend(bytes);
        Ok::<(), ApiError>(())
    };
    let result = body::read(&mut source, body, body::MAX_BODY, each);
    let result = result.map_err(|error| error.describe().0);
    let mut left = source.buffer().to_vec();
    source.consume(left.len());
    left.extend(source.into_inner());
    (result.map(|()| text), left)
}

fuzz_target!(|bytes: &[u8]| {
    let Some((first, bytes)) = bytes.split_first() else { return };
    let kind = match *first {
        length @ ..128 => Body::Length(length.into()),
        _ => Body::Chunked,
    };
    let (result, left) = read(bytes, 1 << 16, kind);
    for piece in [1, 2, 3, 7, 64] {
        let (in_pieces, left_then) = read(bytes, piece, kind);
        assert_eq!(in_pieces, result);
        assert!(result.is_err() || left_then == left);
    }
    let Ok(body) = result else { return };
    let used = &bytes[..bytes.len() - left.len()];
    // It ends where it says, and one byte less is too little.
    assert!(bytes.ends_with(&left));
    assert_eq!(read(used, 9, kind), (Ok(body.clone()), Vec::new()));
    let shorter = used.len().saturating_sub(1 + usize::from(*first) % 64);
    assert!(used.is_empty() || read(&used[..shorter], 9, kind).0 == Err(400));
    // The same body in one chunk.
    let size = match body.len() {
        0 => String::new(),
        size => format!("{size:x}\r\n"),
    };
    let end = if body.is_empty() { "0\r\n\r\n" } else { "\r\n0\r\n\r\n" };
    let whole = [size.as_bytes(), &body, end.as_bytes(), &left].concat();
    assert_eq!(read(&whole, 9, Body::Chunked), (Ok(body), left));
});
