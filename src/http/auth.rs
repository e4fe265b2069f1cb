//! Who is asking: Basic authentication, RFC 7617.

use super::refusal::Refusal;
use std::fmt;
use std::net::IpAddr;

/// The one user name and password, as a client would send them.
///
/// Comparing in this form needs no decoder, and a password that a decoder
/// would cut at a NUL or read in two ways is just a different one.
pub struct Credentials {
    user: String,
    token: String,
}

/// Somebody who may ask for changes. Only [`admit`] makes one.
pub struct Client {
    peer: IpAddr,
    user: Option<String>,
}

/// For the log: address and user, `-` where no credentials were asked for.
impl fmt::Display for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.peer, self.user.as_deref().unwrap_or("-"))
    }
}

impl Credentials {
    /// `None` if either is empty, if the user name holds a colon, which would
    /// end it, or if there are control characters (RFC 7617, 2).
    pub fn new(user: &str, password: &str) -> Option<Credentials> {
        let control = |text: &str| text.contains(char::is_control);
        if user.is_empty()
            || password.is_empty()
            || user.contains(':')
            || control(user)
            || control(password)
        {
            return None;
        }
        let token = base64(format!("{user}:{password}").as_bytes());
        Some(Credentials { user: user.into(), token })
    }
}

/// Lets a peer in: with the right credentials, or where none are asked for.
pub fn admit(
    peer: IpAddr,
    authorization: Option<&str>,
    wanted: Option<&Credentials>,
) -> Result<Client, Refusal> {
    let Some(wanted) = wanted else {
        return Ok(Client { peer, user: None });
    };
    let (scheme, token) = authorization.and_then(|a| a.split_once(' ')).unwrap_or_default();
    let same = same(token.trim_start_matches(' ').as_bytes(), wanted.token.as_bytes());
    match same && scheme.eq_ignore_ascii_case("basic") {
        true => Ok(Client { peer, user: Some(wanted.user.clone()) }),
        false => Err(Refusal::Unauthorized),
    }
}

/// Compares in a time that depends on the length of `given` alone.
fn same(given: &[u8], wanted: &[u8]) -> bool {
    let mut difference = u8::from(given.len() != wanted.len());
    for (at, byte) in given.iter().enumerate() {
        // Behind its end the secret is compared as zeros.
        let secret = wanted.get(at).copied().unwrap_or_default();
        difference = std::hint::black_box(difference | (byte ^ secret));
    }
    difference == 0
}

/// RFC 4648, 4.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for group in bytes.chunks(3) {
        let byte = |at: usize| u32::from(group.get(at).copied().unwrap_or_default());
        let bits = (byte(0) << 16) | (byte(1) << 8) | byte(2);
        for (at, shift) in [18, 12, 6, 0].into_iter().enumerate() {
            let sextet = usize::try_from((bits >> shift) & 63).unwrap_or_default();
            let letter = ALPHABET.get(sextet).copied().filter(|_| at <= group.len());
            out.push(char::from(letter.unwrap_or(b'=')));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_of_rfc_4648() {
        let table = [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
            ("Aladdin:open sesame", "QWxhZGRpbjpvcGVuIHNlc2FtZQ=="),
            ("\u{fb}\u{ff}", "w7vDvw=="),
        ];
        for (text, encoded) in table {
            assert_eq!(base64(text.as_bytes()), encoded);
        }
    }

    #[test]
    fn comparison() {
        let table = [
            ("", "", true),
            ("a", "a", true),
            ("a", "", false),
            ("", "a", false),
            ("ab", "aa", false),
            ("ba", "aa", false),
            ("aa", "aaa", false),
            ("a\0", "a", false),
        ];
        for (given, wanted, equal) in table {
            assert_eq!(same(given.as_bytes(), wanted.as_bytes()), equal, "{given} {wanted}");
        }
    }

    #[test]
    fn who_gets_in() {
        let wanted = Credentials::new("Aladdin", "open sesame").unwrap();
        let peer = IpAddr::from([192, 0, 2, 1]);
        let right = "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==";
        let table = [
            (Some(right), true),
            (Some("bASIC  QWxhZGRpbjpvcGVuIHNlc2FtZQ=="), true),
            (None, false),
            (Some(""), false),
            (Some("Basic"), false),
            (Some("Basic "), false),
            (Some("Bearer QWxhZGRpbjpvcGVuIHNlc2FtZQ=="), false),
            (Some("Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ"), false),
            // "Aladdin:open sesame\0junk"
            (Some("Basic QWxhZGRpbjpvcGVuIHNlc2FtZQBqdW5r"), false),
        ];
        for (authorization, admitted) in table {
            assert_eq!(
                admit(peer, authorization, Some(&wanted)).is_ok(),
                admitted,
                "{authorization:?}"
            );
        }
        assert_eq!(
            admit(peer, Some(right), Some(&wanted)).unwrap().to_string(),
            "192.0.2.1 Aladdin"
        );
        assert_eq!(admit(peer, None, None).unwrap().to_string(), "192.0.2.1 -");
        assert!(Credentials::new("", "x").is_none() && Credentials::new("x", "").is_none());
        assert!(Credentials::new("a:b", "x").is_none());
    }
}
