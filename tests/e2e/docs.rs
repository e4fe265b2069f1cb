//! Keys, options, errors and metrics of the program against the pages that describe them: nothing is
//! missing on either side.

use crate::lab::{Lab, ask, once, sh};
use crate::tls;
use rfw::http::api_error::names;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

const SOURCE: &str = env!("CARGO_MANIFEST_DIR");
const API_ERROR: &str = include_str!("../../src/http/api_error.rs");
const CONFIG: &str = include_str!("../../src/config.rs");

/// Codes in `names`, which has one for each status, that no error of the API uses.
const UNUSED_CODES: [&str; 2] = ["conflict", "internal"];

fn page(name: &str) -> String {
    fs::read_to_string(format!("{SOURCE}/{name}")).expect(name)
}

/// The arguments of each item of an mdoc page: `.It Fl V , Fl -version` → "Fl V , Fl -version".
fn items(page: &str) -> impl Iterator<Item = &str> {
    page.lines().filter_map(|line| line.strip_prefix(".It "))
}

fn section<'a>(page: &'a str, from: &str, to: &str) -> &'a str {
    let (_, rest) = page.split_once(from).expect(from);
    rest.split_once(to).expect(to).0
}

/// What the program has and what the page has must be the same.
fn compare(what: &str, program: impl IntoIterator<Item = String>, page: Vec<String>) {
    let program: BTreeSet<String> = program.into_iter().collect();
    let documented: BTreeSet<String> = page.iter().cloned().collect();
    assert!(!program.is_empty(), "{what}");
    let missing: Vec<_> = program.difference(&documented).collect();
    let unknown: Vec<_> = documented.difference(&program).collect();
    assert!(
        missing.is_empty() && unknown.is_empty(),
        "{what}: missing {missing:?}, not in the program {unknown:?}"
    );
    assert_eq!(page.len(), documented.len(), "{what}: described twice: {page:?}");
}

#[test]
fn every_key_is_in_the_manual_and_in_the_shipped_file() {
    let constant =
        |name: &str| section(CONFIG, &format!("const {name}: &str = \""), "\";").replace('\\', " ");
    let keys = constant("FLAGS") + " " + &constant("SETTINGS");
    let keys: Vec<String> = keys.split_whitespace().map(String::from).collect();

    let manual = page("contrib/man/rfw.conf.5");
    let is_key = |word: &&str| {
        word.contains('.') && word.chars().all(|c| c == '.' || c.is_ascii_alphanumeric())
    };
    let described = items(&manual).flat_map(|item| item.split(' ').filter(is_key));
    compare("keys in rfw.conf(5)", keys.clone(), described.map(String::from).collect());

    let shipped = page("rfw.conf");
    let words = |line: &str| line.split_whitespace().map(String::from).collect::<Vec<_>>();
    let lines = shipped.lines().map(|line| words(line.strip_prefix("# ").unwrap_or(line)));
    let is_setting =
        |words: &Vec<String>| words.len() == 1 || words.get(1).is_some_and(|w| w == "=");
    let set = lines.filter(is_setting).map(|words| words[0].clone());
    let set = set.filter(|word| is_key(&&word[..]) && !word.ends_with('.'));
    compare("keys in rfw.conf", keys, set.collect());
}

/// The options that a usage text lists: `  -V, --version     print the version`.
fn listed(usage: &str) -> Vec<String> {
    let lines = usage.lines().filter_map(|line| line.strip_prefix("  -"));
    let heads = lines.map(|line| line.split("  ").next().unwrap());
    let options = heads.flat_map(|head| head.split(", "));
    options
        .map(|option| format!("-{}", option.trim_start_matches("-").split(' ').next().unwrap()))
        .collect()
}

/// The options that a page describes: `Fl -cert Ar file , Fl -key Ar file`.
fn described(page: &str) -> Vec<String> {
    let options = items(page).flat_map(|item| item.split("Fl ").skip(1));
    options
        .map(|option| format!("-{}", option.trim_start_matches('-').split(' ').next().unwrap()))
        .collect()
}

#[test]
fn every_option_is_in_the_manual() {
    once(|lab: &Lab| {
        for (command, name) in [("", "contrib/man/rfw.8"), ("client ", "contrib/man/rfwc.1")] {
            let (status, usage) = lab.rfw(&format!("{command}-h"));
            assert_eq!(status, 0, "{usage}");
            compare(name, listed(&usage), described(&page(name)));
            // What is not described, the program refuses; what is, it knows.
            let options = items(&page(name)).map(String::from).collect::<Vec<_>>();
            let options = options.iter().flat_map(|item| item.split("Fl ").skip(1));
            for option in options.map(|option| format!("-{}", option.split(' ').next().unwrap())) {
                let said = lab.rfw(&format!("{command}{option}")).1;
                assert!(!said.contains("unknown option"), "{option}: {said}");
            }
        }
    });
}

#[test]
fn every_error_is_in_the_manual_and_in_the_description_of_the_api() {
    let source = API_ERROR.split_once("#[cfg(test)]").unwrap().0;
    let is_code =
        |text: &&str| text.len() > 1 && text.chars().all(|c| c == '_' || c.is_ascii_lowercase());
    let codes = source.split('"').skip(1).step_by(2).filter(is_code);
    let codes = codes.filter(|code| !UNUSED_CODES.contains(code)).collect::<BTreeSet<_>>();

    let manual = page("contrib/man/rfw.8");
    let mut documented = Vec::new();
    for item in items(section(&manual, ".Ss Errors", ".Ss Tags")) {
        let mut status = 0;
        for word in item.split(' ') {
            status = word.parse().unwrap_or(status);
            if is_code(&word) {
                let is_right = names(status).1 == word
                    || source.contains(&format!("({status}, \"{word}\""))
                    || status == 400 && source.contains("(400, code, message)");
                assert!(is_right, "{status} {word}");
                documented.push(word.to_string());
            }
        }
    }
    compare("errors in rfw(8)", codes.iter().map(|code| code.to_string()), documented);

    let api = page("contrib/openapi.yaml");
    let missing: Vec<_> = codes.iter().filter(|code| !api.contains(**code)).collect();
    assert!(missing.is_empty(), "not in contrib/openapi.yaml: {missing:?}");
}

#[test]
fn every_metric_is_in_the_manual() {
    once(|lab: &Lab| {
        tls::keys(lab);
        let _rfw = lab.start(&format!("local.server\n{}", tls::CONF));
        let metrics = ask("GET /metrics").body;
        let types = metrics.lines().filter_map(|line| line.strip_prefix("# TYPE "));
        let metrics: Vec<_> = types.map(|line| line.split(' ').next().unwrap().into()).collect();

        let manual = page("contrib/man/rfw.8");
        let items = items(section(&manual, ".Sh METRICS", ".Sh LIMITS"));
        let names = items.flat_map(|item| item.split("Li ").skip(1));
        let names = names.map(|name| name.split([' ', '{']).next().unwrap().into());
        compare("metrics in rfw(8)", metrics, names.collect());
    });
}

#[test]
fn the_readme_is_short_and_names_what_exists() {
    let readme = page("README.md");
    assert!(readme.lines().count() <= 260, "{} lines", readme.lines().count());
    let manual = page("contrib/man/rfw.8");
    let is_name = |c: char| c == '_' || c.is_ascii_lowercase();
    for name in readme.split(|c| !is_name(c)).filter(|name| name.starts_with("rfw_")) {
        assert!(manual.contains(name), "{name} is not in rfw(8)");
    }
    for file in ["README.md", "CHANGELOG.md", "CONTRIBUTING.md"] {
        for link in page(file).split("](").skip(1).map(|rest| rest.split(')').next().unwrap()) {
            let there = link.starts_with("https://") || Path::new(SOURCE).join(link).exists();
            assert!(there, "{file}: {link}");
        }
    }
}

/// Of each target, what it does and how long it takes.
#[test]
fn make_help_names_every_target() {
    let makefile = page("Makefile").replace("\\\n", " ");
    let phony = makefile.lines().find_map(|line| line.strip_prefix(".PHONY: ")).unwrap();
    let help = sh(&format!("make -s -C '{SOURCE}' help"));
    let lines: Vec<_> = help.lines().filter_map(|line| line.strip_prefix("  make ")).collect();
    let targets = lines.iter().map(|line| line.split(' ').next().unwrap().into()).collect();
    compare("make help", phony.split_whitespace().map(String::from), targets);
    let times = ["second", "minute", "hour", "until Ctrl-C"];
    let is_timed =
        |line: &&&str| line.starts_with("help ") || times.iter().any(|time| line.contains(time));
    let untimed: Vec<_> = lines.iter().filter(|line| !is_timed(line)).collect();
    assert!(untimed.is_empty(), "{untimed:#?}");
}

/// A umask of 027 or 077 is usual on hardened hosts; dpkg-deb refuses what others cannot read.
#[test]
fn a_package_is_built_with_any_umask() {
    once(|_| {
        let said = sh(&format!(
            "cd lab; mkdir -p bin package/etc package/usr/share
             echo 'echo X86-64' > bin/readelf; echo 'stat -c %a package/DEBIAN*' > bin/dpkg-deb
             chmod 755 bin/*; umask 077; PATH=/run/lab/bin:$PATH '{SOURCE}/contrib/deb/pack' package"
        ));
        assert_eq!(said, "755\n");
    });
}

/// As in a chroot: installed again, rfw would start at the next boot.
#[test]
fn a_removal_disables_rfw_without_a_running_systemd() {
    once(|_| {
        sh("mkdir lab/bin; echo 'echo $@' > lab/bin/systemctl; chmod 755 lab/bin/systemctl");
        let said = sh(&format!("PATH=/run/lab/bin:$PATH '{SOURCE}/contrib/deb/prerm' remove"));
        assert!(said.starts_with("--quiet disable rfw.service\nrfw is disabled, "), "{said}");
    });
}

/// Those that need no other machine.
#[test]
fn the_examples_of_the_manual_work() {
    once(|lab: &Lab| {
        lab.write("feed.txt", "198.51.100.0/28 # a feed\n");
        let _rfw = lab.start("local.server");
        let manual = page("contrib/man/rfw.8");
        let examples = section(&manual, ".Sh EXAMPLES", ".Sh SEE ALSO").replace("\\e\n", "");
        let commands = examples.lines().filter(|line| line.starts_with("curl "));
        let commands: Vec<_> = commands.filter(|line| line.contains("127.0.0.1")).collect();
        let said = sh(&format!("cd lab; {}", commands.join(" --fail-with-body; ")));
        let results = said.split("\"result\":\"").skip(1);
        let results: Vec<_> = results.map(|rest| rest.split('"').next().unwrap()).collect();
        let expected = ["inserted", "deleted", "inserted", "inserted", "inserted", "applied"];
        assert_eq!(results, expected, "{said}");
        assert_eq!(lab.rules().len(), 3, "and one with a tag");
    });
}
