//! rfw.conf: the order of its lines, and what stands around them, mean nothing.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rfw::config::{Config, Named};
use std::path::Path;

/// All that a configuration says, less the lines that say it.
fn read(text: &str) -> Result<String, usize> {
    let config = Config::parse(text, Path::new("/etc/rfw")).map_err(|error| error.line)?;
    let path = |named: &Named| named.path.clone();
    let outward = config.outward.as_ref().map(|o| {
        let files = (path(&o.certfile), path(&o.keyfile), o.clientca.as_ref().map(path));
        (o.ip, o.port, files, o.tls12)
    });
    let local = config.local.as_ref().map(|local| (local.port, local.authentication));
    let programs =
        (path(&config.iptables), path(&config.ip6tables), config.ipset.as_ref().map(path));
    // What every configuration is good for.
    assert!(outward.is_some() || local.is_some());
    let has_users = config.credentials.is_some() || config.users.is_some();
    assert!(outward.is_none() || has_users);
    assert!(!local.is_some_and(|local| local.1) || has_users);
    let is_program = |path: &Path| path.is_absolute() || path.components().count() == 1;
    assert!(is_program(&programs.0) && is_program(&programs.1) && config.maxelem > 0);
    let rest = (config.non_restful, config.default_expire, config.maxelem);
    let whitelist = path(&config.whitelist);
    let users = (config.credentials.is_some(), config.users.as_ref().map(path));
    Ok(format!("{outward:?} {local:?} {programs:?} {rest:?} {whitelist:?} {users:?}"))
}

fuzz_target!(|text: &str| {
    let result = read(text);
    if let Err(line) = result {
        assert!(line <= text.lines().count());
    }
    let spaced: String = text.lines().map(|line| format!("\t {} \r\n", line.trim())).collect();
    assert_eq!(read(&spaced), result);
    let mut lines: Vec<&str> = text.lines().collect();
    let Some(section) = lines.iter().position(|line| line.trim() == "[config]") else { return };
    lines[section + 1..].reverse();
    assert_eq!(read(&lines.join("\n")).ok(), result.ok());
});
