//! The program as a command: options, configuration, checks at start, log.

use crate::lab::*;
use crate::tls;
use std::net::TcpListener;

const PROGRAM: &str = env!("CARGO_BIN_EXE_rfw");

/// As in the systemd unit, which passes rfw.conf and the files that LoadCredential= names.
#[test]
fn files_that_the_unit_does_not_pass() {
    once(|lab| {
        sh("mkdir -p credentials/rfw.service lab/etc
            echo u:p all > lab/etc/users; chmod 600 lab/etc/users");
        for (file, is_hidden) in [("users", true), ("/run/lab/etc/users", false)] {
            lab.configure(&format!("local.server\nauth.file = {file}"));
            sh("cp lab/rfw.conf lab/white.list credentials/rfw.service
                chmod 644 credentials/rfw.service/*");
            let (status, said) = lab.rfw("-t -f /run/credentials/rfw.service/rfw.conf");
            let has_hint = said.contains("LoadCredential=");
            assert_eq!((status, has_hint), (i32::from(is_hidden), is_hidden), "{file}: {said}");
        }
        // One that exists, for root only: the unit does not run as root.
        sh("chmod 000 lab/etc/users");
        let rfw = format!("{PROGRAM} -t -f /run/credentials/rfw.service/rfw.conf");
        let said = sh(&format!("setpriv --bounding-set=-all {rfw} 2>&1 || true"));
        assert!(said.contains("Permission denied") && said.contains("LoadCredential="), "{said}");
    });
}

#[test]
fn options() {
    once(|lab| {
        lab.configure("local.server");
        let rows = [
            ("-V", 0, env!("CARGO_PKG_VERSION")),
            ("-h", 0, "--loglevel"),
            ("-t -f rfw.conf", 0, "rfw.conf: OK\noutward.server: OFF\nlocal.server: ON, http://"),
            ("-t -f /run/lab/rfw.conf --logfile - --loglevel ERROR -v", 0, ""),
            ("-t -frfw.conf --logfile=rfw.log --loglevel=error", 0, ""),
            ("-t -f nope.conf", 1, "nope.conf"),
            ("-t -fnope.conf", 1, "nope.conf"),
            ("-t -f", 2, "-f"),
            ("-x", 2, "rfw: unknown option -x\n"),
            ("--logfiel=x", 2, "unknown option --logfiel=x (did you mean --logfile?)"),
            ("--logfiel x", 2, "unknown option --logfiel (did you mean --logfile?)"),
            ("-t rfw.conf", 2, "unexpected argument rfw.conf"),
            ("-t -f rfw.conf --loglevel LOUD", 2, "LOUD"),
            ("-t -f rfw.conf --loglevel=LOUD", 2, "--loglevel LOUD"),
            ("-t -f rfw.conf --logfile", 2, "--logfile needs a value"),
            ("-t -f rfw.conf --logfile=", 2, "--logfile needs a value"),
            ("-t -f rfw.conf -v=1", 2, "-v=1"),
            ("--version=1", 2, "--version=1"),
        ];
        for (options, status, word) in rows {
            let (got, said) = lab.rfw(options);
            assert!(got == status && said.contains(word), "rfw {options}: {got} {said}");
            assert!(status != 1 || said.lines().count() == 1, "one clear sentence: {said}");
        }
        assert_eq!(lab.rules(), [""; 0], "-t changes nothing");
    });
}

/// `rfw -h >/dev/full` was a panic, exit status 134.
#[test]
fn output_that_cannot_be_written_is_an_error() {
    once(|lab| {
        let _rfw = lab.start("local.server");
        // These run as root, even if the server runs as another user.
        sh(&format!(
            "chown root lab/*; ln -sf {} lab/rfw; ln -s rfw lab/rfwc",
            env!("CARGO_BIN_EXE_rfw")
        ));
        let put = "rfwc put /drop/input/any/1.2.3.4";
        let rows = [
            ("rfw -h >/dev/full", "1 rfw: cannot write to standard output: No space left"),
            ("rfw -V >/dev/full", "1 rfw: cannot write to standard output: No space left"),
            ("rfw -t -f rfw.conf >/dev/full", "1 rfw: cannot write to standard output: No space"),
            ("rfw -t -f nope.conf 2>/dev/full", "1\n"),
            ("rfw -x 2>/dev/full", "2\n"),
            ("rfw -h 2>/dev/full", "0 usage"),
            ("rfwc -h >/dev/full", "1 rfwc: cannot write to standard output: No space left"),
            ("rfwc -V >/dev/full", "1 rfwc: cannot write to standard output: No space left"),
            (&format!("{put} >/dev/full"), "1 rfwc: cannot write to standard output: No space"),
            (put, "0 http"),
            ("rfwc get /list >/dev/full", "1 # http://127.0.0.1:7390: No space left"),
            ("rfwc -x 2>/dev/full", "2\n"),
        ];
        for (line, want) in rows {
            let got = sh(&format!(
                "cd lab; {{ ./{line}; }} >out 2>&1 || s=$?; echo ${{s:-0}} $(cat out)"
            ));
            assert!(got.starts_with(want), "{line}: {got}");
        }
    });
}

/// A line of a valid rfw.conf (below), what replaces it, and parts of rfw's error.
const BAD_CONF: [(&str, &str, &[&str]); 36] = [
    ("[config]", "[other]", &["rfw.conf:1"]),
    ("[config]", "local.server", &["rfw.conf:1"]),
    ("[config]", "", &["rfw.conf:2", "[config] is missing"]),
    ("[config]", "[config]|[config]", &["rfw.conf:2"]),
    ("local.server", "local.servr", &["rfw.conf:4", "local.servr", "did you mean local.server?"]),
    ("local.server", "Local.Server", &["rfw.conf:4", "did you mean local.server?"]),
    ("whitelist.file =", "whitelist.file:", &["rfw.conf:2", "as in whitelist.file = ..."]),
    ("white.list", "white.list # mine", &["rfw.conf:2", "a comment must be on a line of its own"]),
    ("local.server", "local.server ; on", &["rfw.conf:4", "a comment must be"]),
    ("local.server", "local.server|default.expire = 3651d", &["rfw.conf:5", "at most 3650d"]),
    ("local.server", "local.server = yes", &["rfw.conf:4"]),
    ("local.server", "local.server =", &["rfw.conf:4"]),
    ("local.server", "local.server|local.server", &["rfw.conf:5", "local.server"]),
    ("local.server", "# none", &["local.server", "outward.server"]),
    ("local.server", "local.server|local.server.authentication", &["auth."]),
    ("local.server", "local.server|default.expire", &["rfw.conf:5"]),
    ("local.server", "local.server|default.expire =", &["rfw.conf:5"]),
    ("local.server", "local.server|default.expire = 10x", &["rfw.conf:5", "10x"]),
    ("local.server", "local.server|default.expire = 1234567890", &["rfw.conf:5"]),
    ("local.server", "local.server|local.server.port = 0", &["rfw.conf:5"]),
    ("local.server", "local.server|local.server.port = 65536", &["rfw.conf:5", "65536"]),
    ("local.server", "local.server|local.server.port = +80", &["rfw.conf:5"]),
    ("local.server", "local.server|local.server.port = 1|local.server.port = 1", &["rfw.conf:6"]),
    ("local.server", "local.server|auth.username = mu|auth.password =", &["rfw.conf:6"]),
    ("local.server", "local.server|outward.server.ip = example.com", &["rfw.conf:5"]),
    ("local.server", "local.server|outward.server", &["outward.server.certfile"]),
    ("local.server", "local.server|\u{1}", &["rfw.conf:5"]),
    ("white.list", "nope.list", &["rfw.conf:2", "nope.list"]),
    ("white.list", "", &["rfw.conf:2"]),
    ("whitelist.file = white.list", "", &["whitelist.file"]),
    ("iptables.path = ", "iptables.path = usr/", &["rfw.conf:3", "absolute"]),
    ("iptables.path = ", "iptables.path = /nope", &["rfw.conf:3", "/nope"]),
    ("iptables.path = ", "iptables.path = nope|# ", &["rfw.conf:3", "/sbin/nope"]),
    ("iptables.path = ", "iptables.path = /run/lab/white.list|#", &["rfw.conf:3"]),
    ("local.server", "local.server|ip6tables.path = ./x", &["rfw.conf:5", "absolute"]),
    ("local.server", "local.server|auth.password = a:b|auth.username = a:b", &["rfw.conf:6"]),
];

#[test]
fn an_invalid_configuration_never_starts() {
    once(|lab| {
        let mut wrong = String::new();
        for (line, instead, words) in BAD_CONF {
            lab.configure("local.server");
            let good = lab.read("rfw.conf");
            lab.write("rfw.conf", &good.replacen(line, &instead.replace('|', "\n"), 1));
            for options in ["-t -f rfw.conf", "-f rfw.conf --logfile -"] {
                let (status, said) = lab.rfw(options);
                let all = words.iter().all(|word| said.contains(word));
                if status != 1 || !all {
                    wrong += &format!("{instead}: {status} {said}");
                }
            }
        }
        assert!(wrong.is_empty(), "\n{wrong}");
    });
}

/// The keys and values that rfw.conf of 0.2.2 has, in its order, with the blanks filled in.
const CONF_022: &str = "#####
# A header
#####

[config]

outward.server

outward.server.port = 7393

outward.server.ip = 0.0.0.0

outward.server.certfile = /run/lab/keys/server_127.0.0.1/server.crt

outward.server.keyfile = /run/lab/keys/server_127.0.0.1/server.key

local.server

local.server.port = 7390

non.restful


# local.server.authentication

auth.username = mu
auth.password = s3cret:pass



# It may be given as:
# - <number>s
default.expire = 24h

whitelist.file = /run/lab/white.list

iptables.path = iptables

";

/// Its command lines are `bin/rfw -f config/rfw.conf --logfile=rfw.log` from a clone, and `rfw -v`.
#[test]
fn the_configuration_of_0_2_2() {
    once(|lab| {
        tls::keys(lab);
        lab.write("white.list", "127.0.0.1\n");
        let blank = CONF_022.replace(" mu\n", " \n").replace(" s3cret:pass\n", " \n");
        lab.write("rfw.conf", &blank);
        let (status, said) = lab.rfw("-t -f rfw.conf");
        assert!(status == 1 && said.contains("rfw.conf:26: auth.username has no value"), "{said}");
        lab.write("rfw.conf", CONF_022);
        let (status, said) = lab.rfw("-t -f rfw.conf");
        let lines = ["default.expire: ON, 86400 s", "iptables: /sbin/iptables", "users: ON, 1"];
        assert!(status == 0 && lines.iter().all(|line| said.contains(line)), "{said}");
        sh("mount -t tmpfs log /var/log");
        for options in ["--logfile=rfw.log", "-v"] {
            let script = format!("cd /run/lab; exec \"$0\" {options} -f rfw.conf");
            let mut rfw = lab.launch(&["/bin/sh", "-c", &script]);
            rfw.await_ready();
            let from = now();
            let put = ask("GET /drop/input/any/1.2.3.4?modify=insert");
            assert!((from..=now() + 1).contains(&(put.expires() - 86_400)), "{put:?}");
            assert!(sh("/sbin/iptables -S").contains("-s 1.2.3.4/32"));
            let options = "-k --user mu:s3cret:pass";
            let deleted = curl(options, "DELETE /drop/input/any/1.2.3.4", "https://127.0.0.1:7393");
            assert!(deleted.ends_with("200"), "{deleted}");
            rfw.kill();
        }
    });
}

/// An ordinary user may have set PATH.
#[test]
fn a_bare_name_is_not_looked_up_in_path() {
    once(|lab| {
        lab.configure("local.server");
        lab.stand_in("");
        sh(
            "mv lab/bin/iptables lab/bin/mytables; mv lab/bin/iptables-restore lab/bin/mytables-restore",
        );
        let conf = lab.read("rfw.conf");
        lab.write("rfw.conf", &conf.replace(&lab.iptables_path(), "mytables"));
        let said = sh(&format!(
            "cd lab; PATH=/run/lab/bin:$PATH {PROGRAM} -t -f rfw.conf 2>&1 || echo $?"
        ));
        assert!(
            said.contains("rfw.conf:3: /sbin/mytables: No such file") && said.ends_with("1\n"),
            "{said}"
        );
    });
}

/// 0.2.2 took quotes literally, too.
#[test]
fn quotes_around_a_password_are_reported() {
    once(|lab| {
        let rows =
            [("\"x y\"", "its quotes"), ("x # mine", "what looks like a comment"), ("x", "")];
        for (password, part) in rows {
            lab.write("rfw.log", "");
            let warning = format!("rfw.conf:6: auth.password is taken literally, including {part}");
            let mut rfw =
                lab.start(&format!("local.server\nauth.username = mu\nauth.password = {password}"));
            let (status, said) = lab.rfw("-t -f rfw.conf");
            let shown = [
                lab.log().contains(&format!("WARNING {warning}")),
                said.contains(&format!("WARNING: {warning}")),
            ];
            assert_eq!((status, shown), (0, [!part.is_empty(); 2]), "{said} {}", lab.log());
            rfw.kill();
        }
    });
}

#[test]
fn on_a_terminal_rfw_prints_where_it_listens_and_logs() {
    once(|lab| {
        lab.configure("local.server");
        // An ordinary user does not own these.
        sh("chown root lab/*");
        let run = format!("{PROGRAM} -f /run/lab/rfw.conf --logfile /run/lab/rfw.log");
        lab.write("run", &format!("exec {run}\n"));
        let words = "rfw: listening at http://127.0.0.1:7390, http://[::1]:7390, \
                     logging to /run/lab/rfw.log\r\n";
        let first = Process::start("script -qfc /bin/sh\t/run/lab/run /run/lab/seen");
        await_true("rfw prints it", 10 + SLACK, || lab.read("seen").contains(words));
        // The log is a file, so a second rfw also prints to standard error that it waits.
        lab.write("second", "");
        let script = format!("exec {run} 2>>/run/lab/second");
        lab.write("run", &script);
        let _second = Process::start("/bin/sh /run/lab/run");
        await_true("rfw prints that it waits", SLACK, || {
            lab.read("second").contains("rfw: another rfw is still running, or a program that a killed rfw started; waiting up to 15 s\n")
        });
        drop(first);
    });
}

#[test]
fn an_invalid_whitelist_never_starts() {
    once(|lab| {
        lab.configure("local.server");
        let rows = [
            ("", "white.list"),
            ("# nobody\n\n", "white.list"),
            ("10.0.0.1\n10.0.0.256\n", "white.list:2"),
            ("10.0.0.0/33\n", "white.list:1"),
            ("10.0.0.9-10.0.0.1\n", "white.list:1"),
            ("10.0.0.1-\n", "white.list:1"),
            ("2001:db8::9-2001:db8::1\n", "white.list:1"),
            ("example.com\n", "white.list:1"),
            ("10.0.0.1 10.0.0.2\n", "white.list:1"),
        ];
        for (list, word) in rows {
            lab.write("white.list", list);
            let (status, said) = lab.rfw("-t -f rfw.conf");
            assert!(status == 1 && said.contains(word), "{list}: {status} {said}");
        }
        let good = "# all\n10.0.0.1 # mine\n10.0.0.0/8\n1.1.1.1-1.1.1.3\n::1\n2001:db8::/48\r\n";
        lab.write("white.list", good);
        assert_eq!(lab.rfw("-t -f rfw.conf").0, 0);
    });
}

#[test]
fn files_that_others_can_write_are_refused() {
    once(|lab| {
        for file in ["rfw.conf", "white.list"] {
            lab.configure("local.server");
            sh(&format!("chmod 646 lab/{file}"));
            let (status, said) = lab.rfw("-t -f rfw.conf");
            assert!(status == 1 && said.contains(file) && said.contains("writ"), "{status} {said}");
            sh(&format!("chmod 600 lab/{file}"));
        }
    });
}

#[test]
fn checks_at_start() {
    once(|lab| {
        let no_match = "case \"$*\" in *comment*) echo \"Couldn't load match \\`comment'\" >&2; exit 2;; esac
            case $me in *restore) /bin/grep -q comment && { echo 'line 2 failed' >&2; exit 2; };; esac";
        let rows = [
            ("kill -9 $$", "iptables"),
            ("echo 'Permission denied (you must be root)' >&2; exit 4", "root"),
            (no_match, "comment"),
        ];
        for (fault, word) in rows {
            lab.stand_in(fault);
            lab.configure("local.server");
            let (status, said) = lab.rfw("-f rfw.conf --logfile -");
            assert!(status == 1 && said.contains(word), "{fault}: {status} {said}");
        }
        sh("chmod -x lab/bin/iptables");
        let (status, said) = lab.rfw("-f rfw.conf --logfile -");
        assert!(status == 1 && said.contains("/run/lab/bin/iptables"), "{status} {said}");

        lab.stand_in("");
        let _busy = TcpListener::bind(LOCAL).unwrap();
        let (status, said) = lab.rfw("-f rfw.conf --logfile -");
        assert!(status == 1 && said.contains("7390"), "{status} {said}");
    });
}

#[test]
fn sigterm_ends_it_and_unblocks_nobody() {
    both(|lab| {
        let mut rfw = lab.start("local.server");
        ask("PUT /drop/input/any/1.2.3.4");
        sh(&format!("kill -TERM {}", rfw.pid()));
        assert_eq!(rfw.signal(), Some(15));
        assert_eq!(lab.rules(), ["INPUT -s 1.2.3.4/32 -j DROP [rfw]"]);
    });
}

#[test]
fn the_log_has_a_line_for_every_change_made_or_refused() {
    once(|lab| {
        let _rfw = lab.start("local.server");
        let rows = [
            ("PUT /drop/input/any/1.2.3.4", "inserted"),
            ("DELETE /drop/input/any/1.2.3.4", "deleted"),
            ("PUT /drop/input/any/192.0.2.1", "whitelisted"),
            ("PUT /drop/input/any/1.2.3.4/99", "bad_mask"),
        ];
        for (request, result) in rows {
            ask(request);
            let last = |log: String| log.lines().rfind(|l| l.contains(request)).map(String::from);
            let line = || last(lab.read("rfw.log")).unwrap_or_default();
            await_true(request, SLACK, || line().contains(result));
            let line = line();
            assert!(line.contains(" INFO ") && line.contains("127.0.0.1"), "{line}");
            let stamp = line.replace(|c: char| c.is_ascii_digit(), "9");
            assert!(stamp.starts_with("9999-99-99T99:99:99.999Z INFO "), "{line}");
        }
        // Input from clients is escaped: it cannot forge a line or control a terminal.
        let mut conn = Conn::open();
        conn.send("PUT /drop/\u{1b}[31m HTTP/1.1\r\nHost: localhost\r\n\r\n");
        conn.rest();
        ask("PUT /drop/input/any/%0a2026-01-01T00:00:00.000Z%20INFO%20x");
        let log = lab.log();
        assert!(!log.contains('\u{1b}') && !log.contains("\n2026-01-01T"), "{log}");
    });
}

#[test]
fn loglevel_and_standard_error() {
    once(|lab| {
        let rows = [
            ("--logfile - --loglevel INFO", true),
            ("--logfile - --loglevel ERROR", false),
            ("--logfile rfw.log --loglevel ERROR -v", true),
            ("--logfile /dev/full", false), // a log that cannot be written never stops the firewall
            ("--logfile /nope/rfw.log -v", true),
        ];
        for (options, shown) in rows {
            lab.configure("local.server");
            lab.write("stderr", "");
            let script = format!("cd /run/lab; exec \"$0\" -f rfw.conf {options}");
            let mut rfw = lab.launch(&["/bin/sh", "-c", &script]);
            rfw.await_ready();
            assert_eq!(ask("DELETE /drop/input/any/1.2.3.4").brief(), "200 absent", "{options}");
            let is_shown = || lab.read("stderr").contains("/drop/input/any/1.2.3.4");
            await_true(options, SLACK, || is_shown() || !shown);
            rfw.await_queued(); // its log is idle, too
            rfw.kill();
            assert_eq!(is_shown(), shown, "{options}: {}", lab.read("stderr"));
        }
    });
}
