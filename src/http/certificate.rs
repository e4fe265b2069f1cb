//! Reads from a certificate what rustls does not show: version and expiry (RFC 5280, 4.1).
//!
//! ```text
//! Certificate    = SEQUENCE { tbsCertificate, ... }
//! tbsCertificate = SEQUENCE { [0] version DEFAULT v1, serialNumber INTEGER, signature SEQUENCE,
//!                             issuer SEQUENCE, validity SEQUENCE { notBefore, notAfter }, ... }
//! ```

use crate::clock::Utc;
use crate::log::Level;
use std::path::Path;
use std::time::Duration;

/// How long before its expiry rfw warns of a certificate.
const SOON: Duration = Duration::from_secs(30 * 86_400);

const INTEGER: u8 = 0x02;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
const SEQUENCE: u8 = 0x30;
const VERSION: u8 = 0xa0;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Certificate {
    /// 1 to 3.
    pub version: u8,
    /// The last second in which it is valid, as Unix time.
    pub expires: Duration,
}

impl Certificate {
    /// Parses DER up to the dates; `None` if that part is not valid.
    pub fn parse(mut der: &[u8]) -> Option<Certificate> {
        let mut certificate = value(&mut der, SEQUENCE)?;
        let mut tbs = value(&mut certificate, SEQUENCE)?;
        let version = match value(&mut tbs, VERSION) {
            None => 1,
            Some([INTEGER, 1, 1]) => 2,
            Some([INTEGER, 1, 2]) => 3,
            Some(_) => return None,
        };
        for tag in [INTEGER, SEQUENCE, SEQUENCE] {
            value(&mut tbs, tag)?;
        }
        let mut validity = value(&mut tbs, SEQUENCE)?;
        time(&mut validity)?;
        let expires = time(&mut validity)?;
        (der.is_empty() && validity.is_empty()).then_some(Certificate { version, expires })
    }
}

/// UTCTime or GeneralizedTime, both to the second (RFC 5280, 4.1.2.5).
fn time(der: &mut &[u8]) -> Option<Duration> {
    let text = match value(der, UTC_TIME) {
        Some(short) => [if short < b"50" { b"20" } else { b"19" }, short].concat(),
        None => value(der, GENERALIZED_TIME)?.into(),
    };
    Utc::parse(&text).map(|Utc(time)| time)
}

/// Splits off the next value if it has this tag; up to 64 KiB, as in webpki (X.690, 8.1.3, 10.1).
fn value<'a>(der: &mut &'a [u8], tag: u8) -> Option<&'a [u8]> {
    let (length, rest) = match der.strip_prefix(&[tag])? {
        [length @ 0..=0x7f, rest @ ..] => (usize::from(*length), rest),
        [0x81, length @ 0x80..=0xff, rest @ ..] => (usize::from(*length), rest),
        [0x82, high @ 1..=0xff, low, rest @ ..] => (u16::from_be_bytes([*high, *low]).into(), rest),
        _ => return None,
    };
    let (value, rest) = rest.split_at_checked(length)?;
    *der = rest;
    Some(value)
}

/// A notice for the administrator if a certificate has expired at `now` or expires soon.
pub fn expiry_notice(file: &Path, expires: Duration, now: Duration) -> Option<(Level, String)> {
    let (level, verb) = match expires.checked_sub(now) {
        None => (Level::Error, "expired"),
        Some(left) if left <= SOON => (Level::Warning, "expires"),
        Some(_) => return None,
    };
    let (file, date) = (file.display(), Utc(expires));
    let advice = "make a new one with rfwgen -f, install it and restart rfw";
    Some((level, format!("{file}: the certificate {verb} at {date}; {advice}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A value in DER: tag, length and the concatenated parts.
    fn der(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
        let content = parts.concat();
        let length = match content.len() {
            n @ ..0x80 => vec![n as u8],
            n @ ..0x100 => vec![0x81, n as u8],
            n => vec![0x82, (n >> 8) as u8, n as u8],
        };
        [&[tag], &*length, &content].concat()
    }

    fn certificate(version: &[u8], not_after: &[u8]) -> Vec<u8> {
        let validity = der(SEQUENCE, &[&der(UTC_TIME, &[b"700101000000Z"]), not_after]);
        let empty = der(SEQUENCE, &[]);
        let serial = der(INTEGER, &[&[1]]);
        let tbs = der(SEQUENCE, &[version, &serial, &empty, &empty, &validity, &empty]);
        der(SEQUENCE, &[&tbs, &empty])
    }

    #[test]
    fn versions() {
        let of = |number: &[u8]| der(VERSION, &[&der(INTEGER, &[number])]);
        let table = [
            (Vec::new(), Some(1)),
            (of(&[1]), Some(2)),
            (of(&[2]), Some(3)),
            (of(&[0]), None), // the default is not written in DER
            (of(&[3]), None),
            (of(&[0, 2]), None),
            (der(VERSION, &[]), None),
            (vec![VERSION, 0x81, 3, INTEGER, 1, 2], None),
        ];
        for (version, want) in table {
            let found =
                Certificate::parse(&certificate(&version, &der(UTC_TIME, &[b"491231235959Z"])));
            let expires = Duration::from_secs(2_524_607_999);
            assert_eq!(found, want.map(|version| Certificate { version, expires }), "{version:?}");
        }
    }

    #[test]
    fn dates() {
        // Checked with: date -u -d DATE +%s
        let table: [(u8, &str, Option<u64>); 24] = [
            (UTC_TIME, "261126003000Z", Some(1_795_653_000)),
            (UTC_TIME, "000229000000Z", Some(951_782_400)),
            (UTC_TIME, "491231235959Z", Some(2_524_607_999)),
            (UTC_TIME, "991231235959Z", Some(946_684_799)),
            (UTC_TIME, "700101000000Z", Some(0)),
            (UTC_TIME, "691231235959Z", None),
            (UTC_TIME, "500101000000Z", None), // 1950
            (GENERALIZED_TIME, "20500101000000Z", Some(2_524_608_000)),
            (GENERALIZED_TIME, "21000301000000Z", Some(4_107_542_400)),
            (GENERALIZED_TIME, "99991231235959Z", Some(253_402_300_799)),
            (GENERALIZED_TIME, "21000229000000Z", None),
            (GENERALIZED_TIME, "00000101000000Z", None),
            (GENERALIZED_TIME, "20501301000000Z", None),
            (GENERALIZED_TIME, "20500001000000Z", None),
            (GENERALIZED_TIME, "20500100000000Z", None),
            (GENERALIZED_TIME, "20500101240000Z", None),
            (GENERALIZED_TIME, "20500101006000Z", None),
            (GENERALIZED_TIME, "20500101000060Z", None),
            (GENERALIZED_TIME, "20500101000000.5Z", None),
            (GENERALIZED_TIME, "+0500101000000Z", None),
            (UTC_TIME, "2611260030Z", None),
            (UTC_TIME, "261126003000+0100", None),
            (UTC_TIME, "261126003000", None),
            (UTC_TIME, "", None),
        ];
        for (tag, text, want) in table {
            let found = Certificate::parse(&certificate(&[], &der(tag, &[text.as_bytes()])));
            assert_eq!(found.map(|it| it.expires.as_secs()), want, "{text}");
        }
    }

    #[test]
    fn invalid_der() {
        let good = certificate(&[], &der(UTC_TIME, &[b"261126003000Z"]));
        assert!(Certificate::parse(&good).is_some());
        for length in 0..good.len() {
            assert_eq!(Certificate::parse(&good[..length]), None, "{length}");
        }
        assert_eq!(Certificate::parse(&[&*good, &[0]].concat()), None);
        let time = der(UTC_TIME, &[b"261126003000Z"]);
        assert_eq!(Certificate::parse(&certificate(&[], &[&*time, &time].concat())), None);
        // The lengths that DER allows, and those it does not.
        let table: [(&[u8], usize, bool); 9] = [
            (&[0x7f], 0x7f, true),
            (&[0x81, 0x80], 0x80, true),
            (&[0x81, 0x7f], 0x7f, false),
            (&[0x82, 1, 0], 0x100, true),
            (&[0x82, 0, 0xff], 0xff, false),
            (&[0x82, 0xff, 0xff], 0xffff, true),
            (&[0x83, 1, 0, 0], 0x10000, false),
            (&[0x80], 0, false),
            (&[0xff], 0, false),
        ];
        for (length, count, is_valid) in table {
            let bytes = [&[SEQUENCE], length, &vec![7; count]].concat();
            let found = value(&mut &*bytes, SEQUENCE);
            assert_eq!(found.map(<[u8]>::len), is_valid.then_some(count), "{length:02x?}");
            assert_eq!(value(&mut &*bytes, INTEGER), None);
            assert_eq!(value(&mut &bytes[..bytes.len() - 1], SEQUENCE), None);
        }
    }

    #[test]
    fn notices() {
        let (file, expires) =
            (Path::new("/etc/rfw/server.crt"), Duration::from_secs(1_795_653_000));
        let table = [
            (SOON + Duration::from_secs(1), None),
            (SOON, Some((Level::Warning, "expires"))),
            (Duration::ZERO, Some((Level::Warning, "expires"))),
        ];
        for (left, want) in table {
            let found = expiry_notice(file, expires, expires - left);
            let want = want.map(|(level, verb)| {
                let date = "2026-11-26T00:30:00.000Z";
                let advice = "make a new one with rfwgen -f, install it and restart rfw";
                (level, format!("/etc/rfw/server.crt: the certificate {verb} at {date}; {advice}"))
            });
            assert_eq!(found, want, "{left:?}");
        }
        let late = expiry_notice(file, expires, expires + Duration::from_nanos(1)).unwrap();
        assert!(
            late.0 == Level::Error && late.1.contains("certificate expired at 2026"),
            "{late:?}"
        );
    }
}
