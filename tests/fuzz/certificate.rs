//! Certificates: what is read of one does not depend on what follows its dates, but on its length.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rfw::http::certificate::Certificate;

fuzz_target!(|der: &[u8]| {
    let Some(found) = Certificate::parse(der) else { return };
    assert!((1..=3).contains(&found.version) && found.expires.as_secs() <= 253_402_300_799);
    assert_eq!(Certificate::parse(&der[..der.len() - 1]), None);
    assert_eq!(Certificate::parse(&[der, &[0]].concat()), None);
});
