//! auth.file: whoever it names is let in with the credentials that stand there, and nobody else; no
//! error shows a password.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rfw::http::auth::{Credentials, LoginThrottle, Users, authenticate};
use rfw::rule::rights::Rights;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Instant;

/// Who is let in with these credentials.
fn ask(users: &Users, name: &str, password: &str) -> Option<(String, Rights)> {
    let field = Credentials::new(name, password)?.field();
    let authorization = field.trim_end().strip_prefix("Authorization: ")?;
    let (peer, throttle) = (IpAddr::from(Ipv4Addr::LOCALHOST), LoginThrottle::default());
    let principal =
        authenticate(peer, Some(authorization), Some(users), &throttle, Instant::now()).ok()?;
    Some((principal.to_string(), principal.rights().clone()))
}

fuzz_target!(|text: &str| {
    let mut users = Users::new(Credentials::new("admin", "secret"));
    match users.add(text) {
        Err(error) => assert!(error.line <= text.lines().count()),
        Ok(()) => {
            let lines = text.lines().map(str::trim);
            for line in lines.filter(|line| !line.is_empty() && !line.starts_with('#')) {
                let (pair, rights) = line.rsplit_once(char::is_whitespace).expect("two words");
                let (name, password) = pair.trim_end().split_once(':').expect("a colon");
                let rights = Rights::parse(rights).expect("rights");
                let who = Some((format!("127.0.0.1 {name}"), rights));
                assert_eq!(ask(&users, name, password), who);
                assert_eq!(ask(&users, name, &format!("{password}x")), None);
                assert_ne!(name, "admin");
            }
            assert!(text.lines().count() > 0);
        }
    }
    let admin = Some(("127.0.0.1 admin".into(), Rights::All));
    assert_eq!(ask(&users, "admin", "secret"), admin);
});
