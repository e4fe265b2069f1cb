//! Who is asking: Basic authentication, RFC 7617.

use super::refusal::Refusal;
use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The one user name and password, as a client would send them.
///
/// Comparing in this form needs no decoder, and a password that a decoder
/// would cut at a NUL or read in two ways is just a different one.
pub struct Credentials {
    user: String,
    token: String,
}

/// Somebody who may ask for changes. Only [`authenticate`] makes one.
pub struct Principal {
    peer: IpAddr,
    user: Option<String>,
}

/// For the log: address and user, `-` where no credentials were asked for.
impl fmt::Display for Principal {
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

    /// The field of a request that shows them, with its CRLF.
    pub fn field(&self) -> String {
        format!("Authorization: Basic {}\r\n", self.token)
    }
}

/// How many wrong credentials an address may send in each [`WINDOW`]; with one
/// more it has to wait for as long, whatever it sends.
const MAX_WRONG: u32 = 10;
const WINDOW: Duration = Duration::from_secs(60);
/// How many addresses are remembered; the oldest is forgotten for a new one.
const MAX_GUESSERS: usize = 1024;

/// Who has sent wrong credentials lately: since when, and how many.
#[derive(Default)]
pub struct LoginThrottle(Mutex<HashMap<IpAddr, (Instant, u32)>>);

impl LoginThrottle {
    /// How long an address has to wait yet.
    fn wait(&self, peer: IpAddr, now: Instant) -> Option<Duration> {
        let peers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (since, wrong) = peers.get(&peer)?;
        let left = WINDOW.saturating_sub(now.saturating_duration_since(*since));
        (*wrong > MAX_WRONG && !left.is_zero()).then_some(left)
    }

    /// Counts a wrong guess. The one that is too many begins the time of waiting.
    fn add(&self, peer: IpAddr, now: Instant) {
        let mut peers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        peers.retain(|_, (since, _)| now.saturating_duration_since(*since) < WINDOW);
        if peers.len() >= MAX_GUESSERS && !peers.contains_key(&peer) {
            let oldest = peers.iter().min_by_key(|(_, (since, _))| *since);
            if let Some(oldest) = oldest.map(|(peer, _)| *peer) {
                peers.remove(&oldest);
            }
        }
        let (since, wrong) = peers.entry(peer).or_insert((now, 0));
        *wrong = wrong.saturating_add(1);
        if *wrong > MAX_WRONG {
            *since = now;
        }
    }
}

/// Lets a peer in: with the right credentials, or where none are asked for.
pub fn authenticate(
    peer: IpAddr,
    authorization: Option<&str>,
    wanted: Option<&Credentials>,
    throttle: &LoginThrottle,
    now: Instant,
) -> Result<Principal, Refusal> {
    let Some(wanted) = wanted else {
        return Ok(Principal { peer, user: None });
    };
    if let Some(left) = throttle.wait(peer, now) {
        return Err(Refusal::Guessing(left));
    }
    let (scheme, token) = authorization.and_then(|a| a.split_once(' ')).unwrap_or_default();
    let same = same(token.trim_start_matches(' ').as_bytes(), wanted.token.as_bytes());
    match same && scheme.eq_ignore_ascii_case("basic") {
        true => Ok(Principal { peer, user: Some(wanted.user.clone()) }),
        false => {
            // Who sends none has not guessed.
            if authorization.is_some() {
                throttle.add(peer, now);
            }
            Err(Refusal::Unauthorized)
        }
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
            ("bb", "aa", false),
            ("\u{1}", "", false),
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
        let now = Instant::now();
        let ask = |authorization, wanted| {
            authenticate(peer, authorization, wanted, &LoginThrottle::default(), now)
        };
        for (authorization, admitted) in table {
            assert_eq!(ask(authorization, Some(&wanted)).is_ok(), admitted, "{authorization:?}");
        }
        assert_eq!(ask(Some(right), Some(&wanted)).unwrap().to_string(), "192.0.2.1 Aladdin");
        assert_eq!(ask(None, None).unwrap().to_string(), "192.0.2.1 -");
        assert!(Credentials::new("", "x").is_none() && Credentials::new("x", "").is_none());
        assert!(Credentials::new("a:b", "x").is_none());
    }

    #[test]
    fn guessing() {
        let wanted = Credentials::new("Aladdin", "open sesame").unwrap();
        let right = Some("Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==");
        let (throttle, start) = (LoginThrottle::default(), Instant::now());
        let peer = |n: u32| IpAddr::V4(n.into());
        let ask = |n: u32, authorization, second: u64| {
            let now = start + Duration::from_secs(second);
            match authenticate(peer(n), authorization, Some(&wanted), &throttle, now) {
                Ok(_) => "in".into(),
                Err(Refusal::Guessing(left)) => format!("wait {}", left.as_secs()),
                Err(_) => "wrong".into(),
            }
        };
        let wrong = Some("Basic x");
        for second in 0..10 {
            assert_eq!(ask(1, wrong, second), "wrong");
        }
        assert_eq!(ask(1, right, 10), "in");
        assert_eq!(ask(1, None, 10), "wrong");
        assert_eq!(ask(1, right, 10), "in");
        assert_eq!(ask(1, wrong, 11), "wrong");
        assert_eq!(ask(1, right, 11), "wait 60");
        assert_eq!(ask(1, wrong, 70), "wait 1");
        assert_eq!(ask(2, right, 70), "in");
        assert_eq!(ask(1, right, 71), "in");
        // Ten in one minute and ten in the next are not too many.
        assert!((0..20).all(|n| ask(3, wrong, 100 + n * 6) == "wrong"));
        // Memory is bounded.
        assert!((10..9_999).all(|n| ask(n, wrong, 300) == "wrong"));
        assert_eq!(throttle.0.lock().unwrap().len(), MAX_GUESSERS);
    }
}
