//! Basic authentication (RFC 7617), and the users in rfw.conf and in the file that
//! `auth.file` names:
//!
//! ```text
//! file = *( line LF ) [ line ]
//! line = *WSP [ "#" comment / name ":" password 1*WSP rights ] *WSP
//! ```
//!
//! Names and passwords in this file contain no white space.

use super::api_error::ApiError;
use crate::mutex::lock;
use crate::rule::net::Net;
use crate::rule::rights::Rights;
use crate::rule::whitelist::LineError;
use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// The most users, in rfw.conf and the file together: every request is compared with each of them.
const MAX_USERS: usize = 256;

/// A user name and password, encoded as a client sends them.
///
/// Comparing this form needs no decoder, which could cut a password at a NUL
/// or accept two encodings of it.
pub struct Credentials {
    user: String,
    token: String,
}

struct User {
    credentials: Credentials,
    rights: Rights,
}

/// The users, each name once.
#[derive(Default)]
pub struct Users(Vec<User>);

/// An authenticated user, or any client of a server without authentication. Only [`authenticate`]
/// makes one.
pub struct Principal {
    peer: IpAddr,
    user: Option<String>,
    rights: Rights,
}

impl Principal {
    pub fn rights(&self) -> &Rights {
        &self.rights
    }
}

/// For the log: address and user, `-` without authentication.
impl fmt::Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.peer, self.user.as_deref().unwrap_or("-"))
    }
}

impl Credentials {
    /// `None` if either is empty or contains a control character, or if the
    /// user name contains a colon, which would end it (RFC 7617, 2).
    pub fn new(user: &str, password: &str) -> Option<Credentials> {
        let is_valid = |text: &str| !text.is_empty() && !text.contains(char::is_control);
        if !is_valid(user) || !is_valid(password) || user.contains(':') {
            return None;
        }
        let token = base64(format!("{user}:{password}").as_bytes());
        Some(Credentials { user: user.into(), token })
    }

    /// The field of a request that carries them, with its CRLF.
    pub fn field(&self) -> String {
        format!("Authorization: Basic {}\r\n", self.token)
    }
}

impl Users {
    /// Starts with the user of rfw.conf, if there is one; this user has all rights.
    pub fn new(admin: Option<Credentials>) -> Users {
        let admin = admin.map(|credentials| User { credentials, rights: Rights::All });
        Users(admin.into_iter().collect())
    }

    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Adds the users of a file. No error shows a password.
    pub fn add(&mut self, text: &str) -> Result<(), LineError> {
        let before = self.0.len();
        for (number, line) in (1..).zip(text.lines().map(str::trim)) {
            if !line.is_empty() && !line.starts_with('#') {
                let added = self.add_line(line);
                added.map_err(|message| LineError { line: number, message })?;
            }
        }
        if self.0.len() == before {
            let message = "the file names no user; write NAME:PASSWORD RIGHTS".into();
            return Err(LineError { line: 0, message });
        }
        Ok(())
    }

    fn add_line(&mut self, line: &str) -> Result<(), String> {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [pair, rights] = *fields else {
            return Err("write NAME:PASSWORD RIGHTS, without other spaces".into());
        };
        let (name, password) = pair.split_once(':').unwrap_or_default();
        let credentials = Credentials::new(name, password)
            .ok_or("write NAME:PASSWORD; neither may be empty or contain a control character")?;
        // The text itself is not shown: it may be the end of a password with a space.
        let rights = Rights::parse(rights).ok_or(
            "the rights are not valid; write all, read or tag=NAME[,NAME...], in lower case",
        )?;
        if self.0.iter().any(|user| user.credentials.user == name) {
            return Err(format!("user '{name}' exists already, in this file or as auth.username"));
        }
        if self.0.len() >= MAX_USERS {
            return Err(format!("there may be at most {MAX_USERS} users, auth.username included"));
        }
        self.0.push(User { credentials, rights });
        Ok(())
    }

    /// Compares with every user, also after a match, so that the time depends only on the length of
    /// `token`.
    fn find(&self, token: &[u8]) -> Option<&User> {
        self.0.iter().fold(None, |found, user| {
            if ct_eq(token, user.credentials.token.as_bytes()) { Some(user) } else { found }
        })
    }
}

/// How many wrong credentials an address may send per [`WINDOW`]. After one
/// more, all its requests are refused for as long.
const MAX_WRONG: u32 = 10;
const WINDOW: Duration = Duration::from_secs(60);
/// How many addresses are remembered; a new one replaces the oldest.
const MAX_GUESSERS: usize = 1024;

/// The addresses that sent wrong credentials lately: since when, and how many.
#[derive(Default)]
pub struct LoginThrottle(Mutex<HashMap<Net, (Instant, u32)>>);

impl LoginThrottle {
    /// How long an address must still wait.
    fn time_left(&self, peer: Net, now: Instant) -> Option<Duration> {
        let peers = lock(&self.0);
        let (since, failures) = peers.get(&peer)?;
        let left = WINDOW.saturating_sub(now.saturating_duration_since(*since));
        (*failures > MAX_WRONG && !left.is_zero()).then_some(left)
    }

    /// Counts wrong credentials. Those beyond the limit start the waiting time.
    fn add(&self, peer: Net, now: Instant) {
        let mut peers = lock(&self.0);
        peers.retain(|_, (since, _)| now.saturating_duration_since(*since) < WINDOW);
        if peers.len() >= MAX_GUESSERS && !peers.contains_key(&peer) {
            let oldest = peers.iter().min_by_key(|(_, (since, _))| *since);
            if let Some(oldest) = oldest.map(|(peer, _)| *peer) {
                peers.remove(&oldest);
            }
        }
        let (since, failures) = peers.entry(peer).or_insert((now, 0));
        *failures = failures.saturating_add(1);
        if *failures > MAX_WRONG {
            *since = now;
        }
    }
}

/// Accepts the credentials of one of `users`; `None` if the server requires no authentication.
pub fn authenticate(
    peer: IpAddr,
    authorization: Option<&str>,
    users: Option<&Users>,
    throttle: &LoginThrottle,
    now: Instant,
) -> Result<Principal, ApiError> {
    let Some(users) = users else {
        return Ok(Principal { peer, user: None, rights: Rights::All });
    };
    if let Some(left) = throttle.time_left(Net::source(peer), now) {
        return Err(ApiError::TooManyGuesses(left));
    }
    let (scheme, token) = authorization.and_then(|a| a.split_once(' ')).unwrap_or_default();
    let user = users.find(token.trim_start_matches(' ').as_bytes());
    match user.filter(|_| scheme.eq_ignore_ascii_case("basic")) {
        Some(User { credentials, rights }) => {
            Ok(Principal { peer, user: Some(credentials.user.clone()), rights: rights.clone() })
        }
        None => {
            // Missing credentials are not a guess.
            if authorization.is_some() {
                throttle.add(Net::source(peer), now);
            }
            Err(ApiError::Unauthorized)
        }
    }
}

/// Compares in a time that depends only on the length of `given`.
fn ct_eq(given: &[u8], secret: &[u8]) -> bool {
    let mut difference = u8::from(given.len() != secret.len());
    for (at, byte) in given.iter().enumerate() {
        // Past its end, the secret is compared as zeros.
        let expected = secret.get(at).copied().unwrap_or_default();
        difference = std::hint::black_box(difference | (byte ^ expected));
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
        for (given, secret, expected) in table {
            let equal = ct_eq(given.as_bytes(), secret.as_bytes());
            assert_eq!(equal, expected, "{given} {secret}");
        }
    }

    #[test]
    fn authentication() {
        let users = Users::new(Credentials::new("Aladdin", "open sesame"));
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
        let (nobody, now) = (Users::default(), Instant::now());
        let ask = |authorization, users| {
            authenticate(peer, authorization, users, &LoginThrottle::default(), now)
        };
        for (authorization, admitted) in table {
            assert_eq!(ask(authorization, Some(&users)).is_ok(), admitted, "{authorization:?}");
        }
        // A server with authentication but without users admits nobody.
        assert!(ask(Some(right), Some(&nobody)).is_err());
        assert!(ask(Some("Basic "), Some(&nobody)).is_err());
        assert_eq!(ask(Some(right), Some(&users)).unwrap().to_string(), "192.0.2.1 Aladdin");
        assert_eq!(ask(None, None).unwrap().to_string(), "192.0.2.1 -");
        assert_eq!(*ask(None, None).unwrap().rights(), Rights::All);
        assert!(Credentials::new("", "x").is_none() && Credentials::new("x", "").is_none());
        assert!(Credentials::new("a:b", "x").is_none());
    }

    /// The user of each token, among several.
    #[test]
    fn users() {
        let mut users = Users::new(Credentials::new("admin", "a"));
        let text = "# peers\n\n  peer1:p1 tag=peer1,x \r\nguard:p:2#\tread\nroot:é all\n";
        users.add(text).unwrap();
        let tags = |names: &str| Rights::parse(names).unwrap();
        let table = [
            ("admin:a", Some(("admin", Rights::All))),
            ("peer1:p1", Some(("peer1", tags("tag=peer1,x")))),
            ("guard:p:2#", Some(("guard", tags("read")))),
            ("root:é", Some(("root", Rights::All))),
            ("root:a", None),
            ("admin:", None),
            ("admin:p1", None),
            ("peer1:p11", None),
            ("peer1:p", None),
            ("# peers:", None),
            (":", None),
            ("", None),
        ];
        for (pair, expected) in table {
            let found = users.find(base64(pair.as_bytes()).as_bytes());
            let found = found.map(|user| (user.credentials.user.as_str(), user.rights.clone()));
            assert_eq!(found, expected, "{pair}");
        }
    }

    #[test]
    fn invalid_files() {
        let table = [
            ("", 0, "names no user"),
            ("# nobody\n\n", 0, "names no user"),
            ("a:secret", 1, "NAME:PASSWORD RIGHTS"),
            ("a:secret all\nb:secret\n", 2, "NAME:PASSWORD RIGHTS"),
            ("a:sec ret all", 1, "without other spaces"),
            ("a:secret read all", 1, "without other spaces"),
            ("a:secret tag=a, b", 1, "without other spaces"),
            ("a:secret all # comment", 1, "without other spaces"),
            ("asecret all", 1, "NAME:PASSWORD;"),
            (":secret all", 1, "neither may be empty"),
            ("#x\n\na: all", 3, "neither may be empty"),
            ("a:sec\u{1}ret all", 1, "control character"),
            ("a:my secret", 1, "rights are not valid"),
            ("a:secret write", 1, "rights are not valid"),
            ("a:secret tag=", 1, "rights are not valid"),
            ("a:secret tag=a,A", 1, "rights are not valid"),
            ("a:secret all\n#\na:secret2 read", 3, "user 'a' exists already"),
            (
                "admin:secret all",
                1,
                "user 'admin' exists already, in this file or as auth.username",
            ),
        ];
        for (text, line, part) in table {
            let mut users = Users::new(Credentials::new("admin", "a"));
            let error = users.add(text).unwrap_err();
            assert_eq!(error.line, line, "{text}: {}", error.message);
            assert!(error.message.contains(part), "{text}: {}", error.message);
            assert!(!error.message.contains("sec"), "a password: {}", error.message);
        }
        let text = |count| (0..count).map(|n| format!("u{n}:x read\n")).collect::<String>();
        assert!(Users::default().add(&text(MAX_USERS)).is_ok());
        let error = Users::default().add(&text(MAX_USERS + 1)).unwrap_err();
        assert_eq!((error.line, error.message.contains("256 users")), (257, true));
        let mut users = Users::new(Credentials::new("admin", "a"));
        assert_eq!(users.add(&text(MAX_USERS)).unwrap_err().line, 256);
    }

    #[test]
    fn guessing() {
        let users = Users::new(Credentials::new("Aladdin", "open sesame"));
        let right = Some("Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==");
        let (throttle, start) = (LoginThrottle::default(), Instant::now());
        let peer = |n: u32| IpAddr::V4(n.into());
        let ask = |n: u32, authorization, second: u64| {
            let now = start + Duration::from_secs(second);
            match authenticate(peer(n), authorization, Some(&users), &throttle, now) {
                Ok(_) => "in".into(),
                Err(ApiError::TooManyGuesses(left)) => format!("wait {}", left.as_secs()),
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
        // One host has all addresses of its /64.
        let guess =
            |ip: String| authenticate(ip.parse().unwrap(), wrong, Some(&users), &throttle, start);
        let is_throttled =
            |n: &i32| matches!(guess(format!("2001:db8::{n}")), Err(ApiError::TooManyGuesses(_)));
        assert_eq!((0..20).filter(is_throttled).count(), 9);
        // Ten in one minute and ten in the next are allowed.
        assert!((0..20).all(|n| ask(3, wrong, 100 + n * 6) == "wrong"));
        // Memory is bounded.
        assert!((10..9_999).all(|n| ask(n, wrong, 300) == "wrong"));
        assert_eq!(throttle.0.lock().unwrap().len(), MAX_GUESSERS);
    }
}
