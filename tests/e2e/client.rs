//! The client, rfwc, with real servers on this and other hosts, and with stand-ins that respond as
//! no rfw does.

use crate::lab::*;
use crate::tls;
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

const LOCAL_URL: &str = "http://127.0.0.1:7390";
const OUTWARD_URL: &str = "https://127.0.0.1:7393";
const SECRET: &str = "mu:s3cret:pass";
/// The same in the form that is sent.
const BASIC: &str = "Authorization: Basic bXU6czNjcmV0OnBhc3M=\r\n";

/// Exit status, standard output and standard error.
type Said = (i32, String, String);

/// Runs rfwc in the lab's directory.
fn rfwc(arguments: &str) -> Said {
    run(command(arguments))
}

fn command(arguments: &str) -> Command {
    let _ = symlink(env!("CARGO_BIN_EXE_rfw"), "/run/lab/rfwc");
    let mut command = Command::new("timeout");
    command.args(["60", "./rfwc"]).args(arguments.split_whitespace());
    command.current_dir("/run/lab").stdin(Stdio::null());
    command
}

fn run(mut command: Command) -> Said {
    let out = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    (out.status.code().expect("an exit status"), text(out.stdout), text(out.stderr))
}

/// The result line of one server without its URL. Checks the rest of the output.
fn result(url: &str, arguments: &str) -> String {
    let (status, out, err) = rfwc(&format!("--server {url} {arguments}"));
    let comment = err.strip_prefix("# ").filter(|_| arguments.starts_with("get "));
    let failed = if status == 0 { String::new() } else { format!("{url}\n") };
    let line = match comment {
        Some(line) => line.strip_suffix(&failed).unwrap_or("?"),
        None => &out,
    };
    assert!(comment.is_some() || err == failed, "{arguments}: {status} {out:?} {err:?}");
    let line = line.strip_prefix(&format!("{url}: ")).unwrap_or(line);
    format!("{status} {}", line.trim_end())
}

fn credentials(lab: &Lab, text: &str) {
    lab.write("secret", text);
}

#[test]
fn one_server() {
    both(|lab| {
        let _rfw = lab.start("local.server");
        lab.write("list", "1.1.1.1\n# me\n192.0.2.1\n3.3.3.0/24\n");
        lab.write("wrong", "1.1.1.1\nx\"\n");
        sh("truncate -s 67108865 lab/bigger");
        let rows = [
            ("put /drop/input/any/1.2.3.4", "0 200 inserted"),
            ("PUT /drop/input/any/1.2.3.4", "0 200 exists"),
            ("put /drop/input/any/1.2.3.4?expire=1h", "0 200 refreshed"),
            ("delete /drop/input/any/1.2.3.4", "0 200 deleted"),
            ("delete /drop/input/any/1.2.3.4/", "0 200 absent"),
            ("put /%64rop/input/any/2001:db8::1", "0 200 inserted"),
            (
                "put /drop/input/any/192.0.2.1",
                "1 409 whitelisted: This overlaps 192.0.2.1 of the whitelist; edit white.list to change that.",
            ),
            ("get /nothing", "1 404 not_found: No such action or chain; GET / shows all paths."),
            ("put /list", "1 405 method_not_allowed: This path supports only GET, DELETE."),
            (
                "put /drop/input/any --list list",
                "0 200 applied: inserted 2, refreshed 0, exists 0, deleted 0, whitelisted_count 1",
            ),
            (
                "--list list delete /drop/input/any",
                "0 200 applied: deleted 2, absent 0, whitelisted_count 1",
            ),
            (
                "put /drop/input/any --list bigger",
                "1 413 content_too_large: A list may have at most 67108864 bytes (64 MiB).",
            ),
            (
                "put /drop/input/any --list wrong",
                "1 400 bad_list: 1 of 2 lines are invalid. Line 2: 'x\\\"' is not an address; write an \
                 address like 192.0.2.1 or 2001:db8::1. Nothing was applied; lenient=true \
                 skips invalid lines. [{\"line\":2,\"message\":\"'x\\\\\\\"' is not an \
                 address; write an address like 192.0.2.1 or 2001:db8::1.\"}]",
            ),
        ];
        table(&rows, |arguments| result(LOCAL_URL, arguments));
        for path in ["/", "/list"] {
            let body = curl("-w %{stderr}", &format!("GET {path}"), LOCAL_URL);
            let (status, out, err) = rfwc(&format!("get {path}"));
            assert_eq!((status, out, err), (0, body, String::new()), "{path}");
        }
        let mut with_input = command("put /drop/input/any --list -");
        with_input.stdin(fs::File::open("/run/lab/list").unwrap());
        assert_eq!(run(with_input).0, 0);
        assert!(lab.rules().contains(&"INPUT -s 3.3.3.0/24 -j DROP [rfw]".into()));
    });
}

#[test]
fn a_long_listing_whole_and_cut_by_its_reader() {
    legacy(|lab| {
        let count = lab.seed(20_000, "rfw");
        let _rfw = lab.start("local.server");
        let (status, out, _) = rfwc("get /list");
        assert_eq!((status, out.lines().count(), out.ends_with("]\n")), (0, count, true));
        // More than fits in a pipe.
        let url = stand_in(&[&ok(&"x\n".repeat(100_000))]).url;
        let said = sh(&format!(
            "cd lab; {{ ./rfwc --server {url} get /x || echo $? >&2; }} 2>err | head -1; cat err"
        ));
        assert_eq!(said, "x\n1\n");
        let (_, said, err) = run({
            let mut full = Command::new("sh");
            full.args(["-c", "./rfwc get /list >/dev/full; echo $?"]).current_dir("/run/lab");
            full
        });
        assert_eq!((&*said, err.contains("No space left"), err.lines().count()), ("1\n", true, 2));
    });
}

#[test]
fn both_names_and_wrong_usage() {
    once(|lab| {
        assert_eq!(
            lab.rfw("client --version"),
            (0, format!("rfwc {}\n", env!("CARGO_PKG_VERSION")))
        );
        lab.write("empty", "# none\n\n");
        lab.write("servers", "https://a.example\n\nhttp://b:x\n");
        lab.write("pem", "no PEM");
        credentials(lab, "mu\n");
        sh("cd lab; ln -s /nowhere gone; truncate -s 64M big; chmod 644 pem");
        let rows = [
            ("-h", 0, "Exit status"),
            ("put /x --help", 0, "--servers"),
            ("-V", 0, env!("CARGO_PKG_VERSION")),
            ("", 2, "put, delete or get"),
            ("get", 2, "put, delete or get"),
            ("post /x", 2, "put, delete or get"),
            ("get /x /y", 2, "put, delete or get"),
            ("get x", 2, "start with /"),
            ("get /é", 2, "escape"),
            ("get /x --list pem", 2, "--list"),
            ("get /x --insecure", 2, "unknown option --insecure; rfwc -h"),
            ("get /x --credential x", 2, "did you mean --credentials?"),
            ("get /x --cert pem --key pem", 2, "chmod 600 pem"),
            ("get /x -k", 2, "-k"),
            ("get /x --timeout", 2, "--timeout needs a value"),
            ("get /x --timeout 0", 2, "seconds"),
            ("get /x --timeout 1.5", 2, "seconds"),
            ("get /x --server http://mu:s3cret@127.0.0.1", 2, "--credentials"),
            ("get /x --server http://127.0.0.1/path", 2, "http://127.0.0.1/path"),
            ("get /x --servers gone", 2, "gone"),
            ("get /x --servers empty", 2, "empty"),
            ("get /x --servers servers", 2, "servers:3"),
            ("put /x --list gone", 2, "gone"),
            ("put /x --list /dev/null", 2, "/dev/null is empty"),
            ("put /x --list .", 2, "."),
            ("get /x --cacert gone", 2, "gone"),
            ("get /x --cacert pem", 2, "CERTIFICATE"),
            ("get /x --cert pem", 2, "--key"),
            ("get /x --credentials gone", 2, "gone"),
            ("get /x --credentials pem", 2, "chmod 600 pem"),
            ("get /x --credentials secret", 2, "USER:PASSWORD"),
        ];
        for (arguments, status, word) in rows {
            let (got, out, err) = rfwc(arguments);
            let text = if status == 0 { &out } else { &err };
            assert!(got == status && text.contains(word), "{arguments}: {got} {out} {err}");
            assert!(
                status == 0 || err.lines().count() == 1 && out.is_empty(),
                "{arguments}: {err}"
            );
            assert!(!err.contains("s3cret"), "{err}");
        }
        // 64 MiB are allowed.
        assert_eq!(rfwc("--timeout 1 put /x --list big").0, 1);
    });
}

#[test]
fn credentials_come_from_a_file_or_the_environment() {
    once(|lab| {
        tls::keys(lab);
        let _rfw = lab.start(&format!("local.server\nlocal.server.authentication\n{}", tls::CONF));
        let ca = "--cacert keys/client/ca.crt";
        let unauthorized = "1 401 unauthorized: Send the user name and password of rfw.conf or auth.file. Pass the right ones with --credentials.";
        for url in [LOCAL_URL, OUTWARD_URL] {
            let ask = |more: &str| result(url, &format!("get /list {ca} {more}"));
            assert_eq!(ask(""), unauthorized);
            for text in [SECRET.into(), format!("{SECRET}\n"), format!("{SECRET}\r\n")] {
                credentials(lab, &text);
                assert_eq!(ask("--credentials secret"), "0 []");
            }
            credentials(lab, "mu:s3cret:pas");
            assert_eq!(ask("--credentials secret"), unauthorized);
        }
        for (text, mode, status) in [
            (SECRET, 0o600, 0),
            (SECRET, 0o400, 0),
            (SECRET, 0o640, 2),
            (SECRET, 0o604, 2),
            (SECRET, 0o660, 2),
            ("mu:s3cret:pass\n\n#x", 0o600, 2),
            (":s3cret", 0o600, 2),
            ("mu:", 0o600, 2),
            ("", 0o600, 2),
        ] {
            credentials(lab, text);
            fs::set_permissions("/run/lab/secret", fs::Permissions::from_mode(mode)).unwrap();
            let (got, out, err) = rfwc("get /list --credentials secret");
            assert_eq!(got, status, "{text:?} {mode:o}: {out} {err}");
            assert!(!err.contains("s3cret"), "{err}");
        }
        for (text, status) in [(SECRET, 0), ("mu:nope", 1), ("", 2), ("mu", 2)] {
            let mut ask = command("get /list");
            ask.env("RFW_CREDENTIALS", text);
            assert_eq!(run(ask).0, status, "{text}");
        }
    });
}

/// The same rule as for rfw: the file must belong to root or the user, and be secret from all
/// others.
#[test]
fn secrets_of_others_are_refused() {
    once(|lab| {
        if !has_users("client::secrets_of_others_are_refused") {
            return;
        }
        credentials(lab, SECRET);
        sh("chown 4321:4321 lab/secret");
        let refused = |run: &str| {
            let (status, _, err) = rfwc("get /x --credentials secret");
            assert_eq!(
                (status, err.split_once("; run ").unwrap().1),
                (2, &*format!("{run}\n")),
                "{err}"
            );
            sh(&format!("cd lab; {run}"));
        };
        refused("chown root secret");
        sh("chmod 640 lab/secret");
        refused("chmod 600 secret");
        assert_eq!(rfwc("--timeout 1 get /x --credentials secret").0, 1, "nobody answers");
    });
}

/// On a terminal, a failed URL was printed twice: with the reason, and alone.
#[test]
fn a_terminal_shows_a_failed_server_once() {
    once(|lab| {
        let _rfw = lab.start("local.server");
        let rows = [
            ("put /x", 1),
            ("put /x 2>&1 | cat", 2),
            ("put /x >out", 1), // only the name; the reason is in the file
            ("get /x", 1),
            ("get /x >out", 1),
            ("get /x 2>err; cat err", 2),
            ("--server http://[::1]:7390 put /x", 2),
        ];
        let _ = command("");
        for (arguments, count) in rows {
            let line = format!("./rfwc --server http://127.0.0.1:7390 {arguments}");
            lab.write("line", &line);
            let seen = sh("cd lab; script -qec '/bin/sh line' /dev/null </dev/null || true");
            assert_eq!(seen.matches("http://").count(), count, "{line}: {seen}");
        }
    });
}

#[test]
fn credentials_are_never_shown() {
    once(|lab| {
        credentials(lab, SECRET);
        let server = stand_in(&[STALL]);
        let url = &server.url;
        for (options, variable) in [("--credentials secret", ""), ("", SECRET)] {
            let mut ask = command(&format!("--server {url} --timeout 5 {options} get /list"));
            if !variable.is_empty() {
                ask.env("RFW_CREDENTIALS", variable);
            }
            let before = server.seen().len();
            let mut child = ask.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            await_true("it has asked", SLACK, || server.seen().len() > before);
            assert!(server.seen()[before].contains(BASIC), "{:?}", server.seen());
            for pid in sh(&format!("echo {0}; pgrep -P {0}", child.id())).lines() {
                let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
                assert!(line.contains("/list") && !line.contains("s3cret"), "{line}");
                let around = fs::read(format!("/proc/{pid}/environ")).unwrap();
                let shown = String::from_utf8_lossy(&around).contains("s3cret");
                assert_eq!(shown, !variable.is_empty());
            }
            drop(child.kill());
            drop(child.wait());
        }
    });
}

#[test]
fn credentials_never_leave_the_host_in_the_clear() {
    once(|lab| {
        sh("cp /etc/hosts hosts; printf '10.9.9.9 gate\n127.0.0.1 near\n' >> hosts
            mount --bind hosts /etc/hosts; ip addr add 10.9.9.9/32 dev lo");
        credentials(lab, SECRET);
        let gate = TcpListener::bind("10.9.9.9:7390").unwrap();
        gate.set_nonblocking(true).unwrap();
        let refused = "1 user and password are sent only over https; write https://";
        for url in ["http://10.9.9.9", "http://gate:7390", "http://[::ffff:10.9.9.9]:7390"] {
            assert_eq!(result(url, "put /x --credentials secret"), refused, "{url}");
        }
        assert!(gate.accept().is_err(), "nothing was sent");
        // Without credentials, http is allowed, and on this host even with them.
        let (server, _far) = (stand_in(&[&ok(INSERTED)]), answering(gate, &[&ok(INSERTED)]));
        assert_eq!(result("http://10.9.9.9", "put /x"), "0 200 inserted");
        let near = server.url.replace("127.0.0.1", "near");
        assert_eq!(result(&near, "put /x --credentials secret"), "0 200 inserted");
    });
}

/// A server's certificate: its issuer, dates, subject and extensions; the host of the URL; and the
/// client's message.
const CERTIFICATES: [[&str; 6]; 15] = [
    ["ours", "2020 2049", "x", "IP:127.0.0.1", "127.0.0.1", "0 []"],
    ["ours", "2020 2049", "x", "DNS:localhost", "localhost", "0 []"],
    [
        "ours",
        "2020 2021",
        "x",
        "IP:127.0.0.1",
        "127.0.0.1",
        "has expired, or the local clock is wrong",
    ],
    [
        "ours",
        "2048 2049",
        "x",
        "IP:127.0.0.1",
        "127.0.0.1",
        "is not valid yet, or the local clock is wrong",
    ],
    [
        "ours",
        "2020 2049",
        "x",
        "IP:127.0.0.2",
        "127.0.0.1",
        "is for IpAddress(127.0.0.2), not for 127.0.0.1",
    ],
    [
        "ours",
        "2020 2049",
        "x",
        "DNS:other.example",
        "localhost",
        "is for DnsName(\"other.example\"), not for localhost",
    ],
    [
        "ours",
        "2020 2049",
        "x",
        "IP:127.0.0.1",
        "localhost",
        "is for IpAddress(127.0.0.1), not for localhost",
    ],
    [
        "ours",
        "2020 2049",
        "127.0.0.1",
        "DNS:localhost",
        "127.0.0.1",
        "is for DnsName(\"localhost\"), not for 127.0.0.1",
    ],
    ["ours", "2020 2049", "127.0.0.1", "", "127.0.0.1", "names no host: it has no subjectAltName"],
    ["ours", "2020 2049", "localhost", "", "localhost", "names no host: it has no subjectAltName"],
    [
        "ours",
        "2020 2049",
        "x",
        "IP:127.0.0.1 clientAuth",
        "127.0.0.1",
        "is not for a server: its extendedKeyUsage lacks serverAuth",
    ],
    ["theirs", "2020 2049", "x", "IP:127.0.0.1", "127.0.0.1", UNTRUSTED],
    ["other", "2020 2049", "x", "IP:127.0.0.1", "127.0.0.1", UNTRUSTED],
    ["itself", "2020 2049", "x", "IP:127.0.0.1", "127.0.0.1", UNTRUSTED],
    [
        "itself",
        "2020 2049",
        "x",
        "IP:127.0.0.1 CA",
        "127.0.0.1",
        "is a CA certificate, perhaps self-signed, not a server's",
    ],
];
const UNTRUSTED: &str = "is not from a trusted CA (see --cacert); it may be self-signed";

/// `theirs` has the same name as `ours`, like every CA that rfwgen makes.
const AUTHORITIES: &str = "
cd /run/lab
rfwgen 127.0.0.1 ours; rfwgen 127.0.0.1 theirs; mkdir -p other/client other/offline
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=other \
    -keyout other/offline/ca.key -out other/client/ca.crt
openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=x -keyout key -out csr
printf '[ca]\ndefault_ca=x\n[x]\ndatabase=index\nnew_certs_dir=.\ndefault_md=sha256\npolicy=p
unique_subject=no\nrand_serial=yes\n[p]\ncommonName=supplied\n' > conf
: > index";

/// Makes the certificate of a row as lab/crt.
fn make_certificate([signer, dates, subject, extensions, ..]: [&str; 6]) {
    let (from, to) = dates.split_once(' ').unwrap();
    let (names, usage) = extensions.split_once(' ').unwrap_or((extensions, ""));
    let names = if names.is_empty() { String::new() } else { format!("subjectAltName={names}\n") };
    let usage = match usage {
        "CA" => "basicConstraints=critical,CA:TRUE\n",
        "clientAuth" => "extendedKeyUsage=clientAuth\n",
        _ => "extendedKeyUsage=serverAuth\n",
    };
    let by = match signer {
        "itself" => "-selfsign -keyfile key".into(),
        ca => format!("-cert {ca}/client/ca.crt -keyfile {ca}/offline/ca.key"),
    };
    sh(&format!(
        "cd lab; printf '[e]\n{names}{usage}' > ext
         openssl ca -batch -config conf -extfile ext -extensions e -subj /CN={subject} -in csr -out crt \
             -startdate {from}0101000000Z -enddate {to}0101000000Z {by} 2>&1"
    ));
}

/// `openssl s_server` with lab/crt, which responds to GET /answer.
fn s_server(options: &str) -> Process {
    let words = format!("s_server -accept 127.0.0.1:7443 -cert crt -key key -HTTP {options}");
    let server = Process::start(&format!("env -C /run/lab openssl {}", words.trim()));
    await_true("openssl listens", SLACK, || TcpStream::connect("127.0.0.1:7443").is_ok());
    server
}

#[test]
fn bad_certificates_are_refused_with_their_cause() {
    once(|lab| {
        let rfwgen = concat!(env!("CARGO_MANIFEST_DIR"), "/contrib/rfwgen");
        sh(&AUTHORITIES.replace("rfwgen", rfwgen));
        lab.write("answer", &ok("[]"));
        let mut wrong = String::new();
        let mut check = |what: &str, host: &str, options: &str, want: &str| {
            let got = result(&format!("https://{host}:7443"), &format!("get /answer {options}"));
            let got = got.trim_start_matches("1 the server's certificate ");
            if got != want {
                wrong += &format!("{what}\n    is     {got}\n    not    {want}\n");
            }
        };
        for row in CERTIFICATES {
            make_certificate(row);
            let _server = s_server("");
            check(&row.join(", "), row[4], "--cacert ours/client/ca.crt", row[5]);
        }
        make_certificate(CERTIFICATES[0]);
        let server = s_server("");
        check("the public CAs", "127.0.0.1", "", UNTRUSTED);
        check("a file with another CA", "127.0.0.1", "--cacert two", {
            sh("cd lab; cat other/client/ca.crt ours/client/ca.crt > two");
            "0 []"
        });
        drop(server);
        let _server = s_server("-tls1_2");
        let old = "1 no TLS 1.3 with this server: received fatal alert: ProtocolVersion";
        check("TLS 1.2", "127.0.0.1", "--cacert ours/client/ca.crt", old);
        assert!(wrong.is_empty(), "\n{wrong}");
    });
}

#[test]
fn client_certificates() {
    once(|lab| {
        tls::keys(lab);
        let rfwgen = concat!(env!("CARGO_MANIFEST_DIR"), "/contrib/rfwgen");
        sh(&format!("cd lab; {rfwgen} --client alice keys; {rfwgen} --client eve theirs"));
        credentials(lab, SECRET);
        let _rfw = lab.start(&format!(
            "local.server\n{}\noutward.server.clientca = keys/client/ca.crt",
            tls::CONF
        ));
        sh("chown -R root lab/secret lab/keys lab/theirs"); // rfwc runs as root
        let with = |pair: &str| match pair {
            "" => String::new(),
            pair => format!("--cert {pair}.crt --key {pair}.key"),
        };
        let refused = "1 the server rejects the certificate of --cert";
        let rows = [
            ("keys/client_alice/client", "0 []"),
            ("", "1 the server requires a client certificate; pass one with --cert and --key"),
            ("theirs/client_eve/client", refused),
            ("keys/server_127.0.0.1/server", refused),
        ];
        // Also if a long list is refused before it is read.
        lab.write("list", &"1.2.3.4\n".repeat(500_000));
        for method in ["get /list", "put /drop/input/any --list list"] {
            table(&rows, |pair| {
                let options =
                    format!("--credentials secret --cacert keys/client/ca.crt {}", with(pair));
                let got = result(OUTWARD_URL, &format!("{method} {options}"));
                let put = "0 200 applied: inserted 1, refreshed 0, exists 0, deleted 0, whitelisted_count 0";
                let got = if got == put { "0 []" } else { &got };
                got.split(" (").next().unwrap().into()
            });
            lab.iptables("-F INPUT");
        }
        let mixed =
            "--cert keys/client_alice/client.crt --key theirs/client_eve/client.key get /list";
        let (status, _, err) = rfwc(mixed);
        assert!(status == 2 && err.contains("pair"), "{status} {err}");
    });
}

// --- Stand-ins -------------------------------------------------------------------------------------

const INSERTED: &str = "{\"result\":\"inserted\",\"rule\":{},\"expires\":null,\"tag\":null}\n";
/// A response that never comes.
const STALL: &str = "STALL";

fn ok(body: &str) -> String {
    answer(200, "", body)
}

fn answer(status: u16, fields: &str, body: &str) -> String {
    format!("HTTP/1.1 {status} X\r\n{fields}Content-Length: {}\r\n\r\n{body}", body.len())
}

fn busy(fields: &str) -> String {
    answer(503, fields, "{\"error\":\"busy\",\"message\":\"Later.\"}\n")
}

/// A server that sends one of these responses to each connection, and the last one to all further
/// ones.
struct StandIn {
    url: String,
    seen: Arc<Mutex<Vec<(Instant, String)>>>,
}

impl StandIn {
    /// The requests so far.
    fn seen(&self) -> Vec<String> {
        self.seen.lock().unwrap().iter().map(|(_, request)| request.clone()).collect()
    }
}

fn stand_in(answers: &[&str]) -> StandIn {
    answering(TcpListener::bind("127.0.0.1:0").unwrap(), answers)
}

fn answering(listener: TcpListener, answers: &[&str]) -> StandIn {
    listener.set_nonblocking(false).unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let answers: Vec<String> = answers.iter().map(|answer| answer.to_string()).collect();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let stand_in = StandIn { url, seen: seen.clone() };
    thread::spawn(move || {
        let mut stalled = Vec::new();
        for (at, stream) in listener.incoming().enumerate() {
            let mut stream = stream.unwrap();
            let request = read_request(&mut stream);
            seen.lock().unwrap().push((Instant::now(), request));
            let answer = &answers[at.min(answers.len() - 1)];
            drop(stream.write_all(answer.trim_end_matches(STALL).as_bytes()));
            if answer.ends_with(STALL) {
                stalled.push(stream);
            }
        }
    });
    stand_in
}

fn read_request(stream: &mut TcpStream) -> String {
    let (mut request, mut piece) = (String::new(), [0; 65536]);
    loop {
        let count = stream.read(&mut piece).unwrap_or(0);
        request += &String::from_utf8_lossy(&piece[..count]);
        let whole = |(head, body): (&str, &str)| {
            let length = head.split_once("Content-Length: ").expect("a length").1;
            body.len() == length.split("\r\n").next().unwrap().parse::<usize>().unwrap()
        };
        // If it is not HTTP, no end of a request can be expected.
        if count == 0
            || !request.contains("HTTP/1.1")
            || request.split_once("\r\n\r\n").is_some_and(whole)
        {
            return request;
        }
    }
}

#[test]
fn the_request_as_it_is_sent() {
    once(|lab| {
        let server = stand_in(&[&ok(INSERTED)]);
        lab.write("list", "1.2.3.4\n");
        assert_eq!(result(&server.url, "delete /a%20b?c=d&e --list list"), "0 200 inserted");
        let host = server.url.trim_start_matches("http://");
        let head = format!("DELETE /a%20b?c=d&e HTTP/1.1\r\nHost: {host}\r\n");
        assert_eq!(server.seen(), [format!("{head}Content-Length: 8\r\n\r\n1.2.3.4\n")]);

        let six = answering(TcpListener::bind("[::1]:7390").unwrap(), &[&ok(INSERTED)]);
        assert_eq!(result("http://[::1]", "put /x"), "0 200 inserted");
        assert!(six.seen()[0].contains("\r\nHost: [::1]:7390\r\n"), "{:?}", six.seen());

        // The proxy settings of other programs do not apply.
        let mut proxied = command(&format!("--server {} put /x", server.url));
        proxied.envs(
            ["http_proxy", "HTTP_PROXY", "all_proxy"].map(|name| (name, "http://127.0.0.1:1")),
        );
        assert_eq!(run(proxied).0, 0);
    });
}

#[test]
fn which_failures_are_retried() {
    once(|_| {
        let (inserted, refusal) = (ok(INSERTED), "{\"error\":\"e\",\"message\":\"m\"}");
        let cut = &inserted[..inserted.len() - 9];
        let refused = |status| answer(status, "Location: /y\r\n", refusal);
        let done = "0 200 inserted";
        let rows: Vec<(Vec<String>, &str, usize)> = vec![
            (vec![busy(""), busy("Retry-After: 1\r\n"), inserted.clone()], done, 3),
            (vec!["".into(), "".into(), inserted.clone()], done, 3),
            (vec![cut.into(), inserted.clone()], done, 2),
            (vec!["HTTP/1.1 200 X\r\n".into(), inserted.clone()], done, 2),
            (vec![busy("Retry-After: 1000\r\n")], "1 503 busy: Later.", 1),
            (vec![refused(409)], "1 409 e: m", 1),
            (vec![refused(302)], "1 302 e: m", 1),
            (vec![answer(429, "Retry-After: 1\r\n", refusal), inserted.clone()], done, 2),
            (vec![answer(429, "Retry-After: 60\r\n", refusal)], "1 429 e: m", 1),
            (vec![refused(500)], "1 500 e: m", 1),
            (vec![answer(502, "", "<html>")], "1 502", 1),
        ];
        for (answers, want, count) in rows {
            let server = stand_in(&answers.iter().map(String::as_str).collect::<Vec<_>>());
            assert_eq!(result(&server.url, "put /x"), want, "{answers:?}");
            assert_eq!(server.seen().len(), count, "{answers:?}");
        }
        let server = stand_in(&[&busy("Retry-After: 3\r\n"), &inserted]);
        assert_eq!(result(&server.url, "put /x"), done);
        let times: Vec<_> = server.seen.lock().unwrap().iter().map(|(time, _)| *time).collect();
        assert!(times[1] - times[0] >= Duration::from_secs(3));

        // Nothing listens yet.
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let refused = || sh("awk '/^Tcp: [0-9]/ { print $8 }' /proc/net/snmp");
        let before = refused();
        let late = thread::spawn(move || result(&format!("http://{address}"), "put /x"));
        await_true("a connection is refused", 10 + SLACK, || refused() != before);
        let server = answering(TcpListener::bind(address).unwrap(), &[&inserted]);
        assert_eq!((late.join().unwrap().as_str(), server.seen().len()), (done, 1));
    });
}

#[test]
fn a_change_whose_response_is_lost_is_retried() {
    once(|_| {
        let server = stand_in(&[STALL, &ok(INSERTED)]);
        // Within the default time limit.
        assert_eq!(result(&server.url, "put /x"), "0 200 inserted");
        assert_eq!(server.seen().len(), 2);
    });
}

#[test]
fn invalid_responses() {
    once(|_| {
        let not_http = "the response is not HTTP/1.1, or does not state its length";
        let long = |name: &str| format!("HTTP/1.1 200 X\r\nX: {}", name.repeat(20_000));
        let rows: Vec<(String, String)> = vec![
            ("SSH-2.0-OpenSSH_9\r\nSTALL".into(), not_http.into()),
            ("\x15\x03\x03".into(), not_http.into()),
            ("HTTP/1.1 200 X\r\n\r\n{}".into(), not_http.into()),
            ("HTTP/1.1 200 X\r\nContent-Length: x\r\n\r\nSTALL".into(), not_http.into()),
            (long("a"), not_http.into()),
            (long("a\r\nX: "), not_http.into()),
            (ok("<html>"), "200, but the response is not from rfw".into()),
            (ok(&format!("{INSERTED}{}", " ".repeat(65_536))), "the response is too long".into()),
            (
                "HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n".into(),
                "the response has malformed chunks".into(),
            ),
            (
                answer(400, "", "{\"error\":\"e\",\"message\":\"a\x1b[2J\\u001b\"}"),
                "400 e: a?[2J\\u001b".into(),
            ),
        ];
        for (answer, want) in &rows {
            let server = stand_in(&[answer]);
            assert_eq!(result(&server.url, "put /x"), format!("1 {want}"), "{answer:.60}");
            assert_eq!(server.seen().len(), 1, "{answer:.60}");
        }
        // A server that does not speak TLS is not retried either.
        let server = stand_in(&["HTTP/1.1 400 Bad Request\r\n\r\n"]);
        let url = server.url.replace("http", "https");
        assert_eq!(result(&url, "put /x"), "1 the server does not speak TLS");
        assert_eq!(server.seen().len(), 1);

        for part in [
            "STALL",
            "HTTP/1.1 200 X\r\nSTALL",
            "HTTP/1.1 200 X\r\nContent-Length: 9\r\n\r\nxSTALL",
        ] {
            let got = result(&stand_in(&[part]).url, "put /x --timeout 1");
            assert!(
                ["1 no response in time", "1 no complete response in time"].contains(&&*got),
                "{got}"
            );
        }
        let cannot = result("http://127.0.0.1:1", "put /x --timeout 1");
        assert_eq!(cannot, "1 cannot connect to 127.0.0.1:1: Connection refused (os error 111)");
        let nowhere = result("http://no.such.host.invalid", "put /x --timeout 1");
        assert!(nowhere.starts_with("1 cannot resolve the host name"), "{nowhere}");
    });
}

#[test]
fn an_incomplete_body_is_a_failure() {
    once(|_| {
        let chunks = "HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nab\n\r\n";
        let rows = [
            (ok("ab\ncd"), 0, "ab\ncd", ""),
            (format!("{chunks}0\r\n\r\n"), 0, "ab\n", ""),
            (chunks.into(), 1, "ab\n", "the response is incomplete"),
            (format!("{chunks}3\r\nc"), 1, "ab\nc", "the response is incomplete"),
            (
                "HTTP/1.1 200 X\r\nContent-Length: 9\r\n\r\nabcd".into(),
                1,
                "abcd",
                "the response is incomplete",
            ),
        ];
        for (answer, status, out, err) in rows {
            let server = stand_in(&[&answer]);
            let got = rfwc(&format!("--server {} get /x", server.url));
            assert_eq!((got.0, &*got.1), (status, out), "{answer}");
            assert!(got.2.contains(err) && got.2.is_empty() == err.is_empty(), "{}", got.2);
            assert_eq!(server.seen().len(), 1, "output cannot be taken back");
        }
        // With several servers, each line starts with the URL of its server.
        let servers =
            [stand_in(&[&ok("ab\ncd")]), stand_in(&[chunks]), stand_in(&[&answer(404, "", "")])];
        let urls = servers.each_ref().map(|server| server.url.as_str());
        let options = urls.map(|url| format!("--server {url} ")).concat();
        let (status, out, err) = rfwc(&format!("{options} get /x"));
        let mut lines: Vec<_> = out.lines().map(String::from).collect();
        let mut want = vec![
            format!("{}: ab", urls[0]),
            format!("{}: cd", urls[0]),
            format!("{}: ab", urls[1]),
            format!("{}: the response is incomplete", urls[1]),
            format!("{}: 404", urls[2]),
        ];
        lines.sort();
        want.sort();
        assert_eq!((status, lines), (1, want));
        let mut failed: Vec<_> = err.lines().collect();
        failed.sort_unstable();
        let mut want = urls[1..].to_vec();
        want.sort_unstable();
        assert_eq!(failed, want);
    });
}

#[test]
fn one_list_to_many_servers() {
    once(|lab| {
        let list = "1.2.3.4\n".repeat(20_000);
        lab.write("list", &list);
        let whitelisted = answer(409, "", "{\"error\":\"whitelisted\",\"message\":\"No.\"}\n");
        let applied = ok(
            "{\"result\":\"applied\",\"inserted\":1,\"whitelisted_count\":0,\"whitelisted\":[]}\n",
        );
        let servers: Vec<StandIn> = (0..300)
            .map(|n| {
                let ip = Ipv4Addr::new(127, 0, 1 + (n / 250) as u8, 1 + (n % 250) as u8);
                let listener = TcpListener::bind((ip, 7390)).unwrap();
                match n {
                    7 => answering(listener, &[&whitelisted, &applied]),
                    8 => answering(listener, &[&busy(""), &applied]),
                    _ => answering(listener, &[&applied]),
                }
            })
            .collect();
        let mut urls: Vec<_> = servers.iter().map(|server| server.url.clone()).collect();
        urls.push("http://127.0.0.1:1".into());
        lab.write("servers", &format!("# all\n\n{}  # the last\n", urls.join("\n")));
        let (status, out, err) =
            rfwc("--timeout 10 --servers servers put /drop/input/any --list list");
        let mut results: Vec<_> = out.lines().map(String::from).collect();
        results.sort();
        let words = |at: usize| match at {
            7 => "409 whitelisted: No.",
            300 => "cannot connect to 127.0.0.1:1: Connection refused (os error 111)",
            _ => "200 applied: inserted 1, whitelisted_count 0",
        };
        let mut want: Vec<_> =
            urls.iter().enumerate().map(|(at, url)| format!("{url}: {}", words(at))).collect();
        want.sort();
        assert_eq!((status, results), (1, want));
        assert_eq!(err, format!("{}\n{}\n", urls[7], urls[300]));
        for server in &servers {
            assert!(server.seen().last().unwrap().ends_with(&format!("\r\n\r\n{list}")));
        }
        // Standard error can be used as a list of servers.
        lab.write("failed", &err);
        let _late = answering(TcpListener::bind("127.0.0.1:1").unwrap(), &[&applied]);
        let (status, out, err) = rfwc("--servers failed put /drop/input/any --list list");
        assert_eq!((status, out.lines().count(), err), (0, 2, String::new()));
    });
}

#[test]
fn a_progress_bar_if_standard_error_is_a_terminal() {
    once(|lab| {
        let servers =
            [ok(INSERTED), ok(INSERTED), answer(409, "", "")].map(|answer| stand_in(&[&answer]));
        lab.write("servers", &servers.each_ref().map(|server| server.url.clone()).join("\n"));
        let ask = "./rfwc --servers servers put /x";
        let (status, _, err) = rfwc("--servers servers put /x");
        assert_eq!((status, err), (1, format!("{}\n", servers[2].url)), "no terminal, no bar");
        // Only standard error is a terminal.
        let said =
            sh(&format!("cd lab; script -qec '{ask} >out' /dev/null </dev/null || true; cat out"));
        assert!(said.starts_with(&format!("\r[{}] 0 of 3, 0 failed", ".".repeat(30))), "{said:?}");
        assert!(said.contains(&format!("\r[{}] 3 of 3, 1 failed\r", "#".repeat(30))), "{said:?}");
        assert!(
            said.contains(&format!("\r{}\r{}\r\n", " ".repeat(70), servers[2].url)),
            "{said:?}"
        );
        assert_eq!(lab.read("out").lines().count(), 3, "{said:?}");
        // A single server has no bar.
        let said = sh(&format!(
            "cd lab; script -qec './rfwc --server {} put /x' /dev/null </dev/null",
            servers[0].url
        ));
        assert_eq!(said, format!("{}: 200 inserted\r\n", servers[0].url));
    });
}

// --- Batches ---------------------------------------------------------------------------------------

/// Runs `rfwc batch -` with these lines on its standard input.
fn batch(arguments: &str, lines: &[u8]) -> Said {
    fs::write("/run/lab/lines", lines).unwrap();
    let mut command = command(&format!("{arguments} batch -"));
    command.stdin(fs::File::open("/run/lab/lines").unwrap());
    run(command)
}

fn put_lines(count: usize) -> String {
    let path = |n| format!("/drop/input/any/10.{}.{}.{}", n / 65536, n / 256 % 256, n % 256);
    (0..count).map(|n| format!("put {}\n", path(n))).collect()
}

/// The sorted numbers of the lines that failed on a server; each is reported with these words.
fn failed_lines(out: &str, url: &str, words: &str) -> Vec<usize> {
    let mut numbers = Vec::new();
    for line in out.lines().filter_map(|line| line.strip_prefix(&format!("{url}: line "))) {
        let (number, rest) = line.split_once(": PUT /drop/input/any/10.").expect(line);
        assert!(rest.contains(words), "{line}");
        numbers.push(number.parse().unwrap());
    }
    numbers.sort_unstable();
    numbers
}

#[test]
fn batch_reports_failures_by_line() {
    both(|lab| {
        let _rfw = lab.start("local.server");
        let long = "/".repeat(8192);
        let lines = format!(
            "# a comment\n\nput /drop/input/any/1.1.1.1\r\n  PUT  /drop/input/any/1.1.1.2?expire=1h \n\
             put /drop/input/any/192.0.2.1\nget /list\nput\nput /a b\nput drop\nput {long}\nput /\u{e9}\n\
             put /nothing/\x1b[2J\ndelete /drop/input/any/1.1.1.3\nput /drop/input/any/1.1.1.4"
        );
        let (status, out, err) = batch("", lines.as_bytes());
        let whitelisted = "409 whitelisted: This overlaps 192.0.2.1 of the whitelist; edit white.list to change that.";
        let refused =
            format!("{LOCAL_URL}: line 5: PUT /drop/input/any/192.0.2.1: {whitelisted}\n");
        assert_eq!((status, out), (1, refused));
        let wrong = [6, 7, 8, 9, 10, 11, 12].map(|number| {
            let sentence = "write put PATH or delete PATH, at most 8192 bytes";
            format!("# line {number}: {sentence}\n")
        });
        assert_eq!(err, format!("{}{LOCAL_URL}\n", wrong.concat()));
        let rules = lab.rules();
        assert_eq!(rules.len(), 3, "{rules:?}");
        // A file, and a tag for all lines.
        lab.write(
            "file",
            "delete /drop/input/any/1.1.1.1\nput /drop/input/any/1.1.1.1?expire=1h\n",
        );
        assert_eq!(rfwc("batch file --tag peer"), (0, String::new(), String::new()));
        let body = ask("GET /list?tag=peer").body;
        assert_eq!(body.matches("\"source\":").count(), 1, "{body}");
        assert_eq!(lab.rules(), rules, "the untagged ones are others");
        let (status, _, err) = rfwc("batch gone");
        assert_eq!((status, err.starts_with("rfwc: gone: cannot read it")), (2, true), "{err}");
        let (status, _, err) = rfwc("batch .");
        assert_eq!((status, err.contains("Is a directory")), (1, true), "{err}");
    });
}

#[test]
fn batch_keeps_connections_and_the_order_that_matters() {
    both(|lab| {
        modes(lab, "", |_, sets| {
            // Each line undoes or covers the previous one.
            let mut lines = String::new();
            for round in 0..20 {
                for host in 0..10 {
                    lines += &format!("put /drop/input/any/10.{host}.0.1\n");
                    lines += &format!("delete /drop/input/any/10.{host}.0.1/\n");
                }
                lines += &format!("put /drop/forward/any/10.0.0.0/16?expire={}m\n", round + 10);
                lines += "put /accept/forward/any/0.0.0.0/any/10.0.0.9\n";
            }
            lines += "delete /list?tag=nobody\n";
            assert_eq!(batch("", lines.as_bytes()), (0, String::new(), String::new()));
            let chains = ["/list/input", "/list/forward"].map(|path| ask(&format!("GET {path}")));
            assert_eq!(chains[0].body, "[]\n");
            let (accept, drop) = (chains[1].body.find("ACCEPT"), chains[1].body.find("DROP"));
            assert!(accept.unwrap() < drop.unwrap(), "{}", chains[1].body);
            let expires: Vec<_> = chains[1].body.matches("\"expires\":1").collect();
            assert_eq!(expires.len(), 1);

            let count = if sets { 5000 } else { 400 };
            assert_eq!(batch("", put_lines(count).as_bytes()).0, 0);
            assert_eq!(ask("GET /list/input").body.lines().count(), count);
            let metrics = ask("GET /metrics").body;
            let accepted = metrics.split("\nrfw_accepted_connections_total ").nth(1).unwrap();
            let accepted: usize = accepted.lines().next().unwrap().parse().unwrap();
            assert!(accepted < 250, "{accepted} connections");
        });
    });
}

#[test]
fn batch_sends_each_line_at_once_from_a_pipe_that_stays_open() {
    once(|lab| {
        let mut rfw = lab.start("local.server");
        let mut child = command("batch - --timeout 20").stdin(Stdio::piped()).spawn().unwrap();
        let mut pipe = child.stdin.take().unwrap();
        let mut done = |n: usize| {
            writeln!(pipe, "put /drop/input/any/10.0.0.{n}").unwrap();
            await_true("the line is done", SLACK + 5, || lab.rules().len() == n);
        };
        (1..4).for_each(&mut done);
        rfw.restart(); // the connection that it kept is broken
        done(4);
        rfw.kill();
        writeln!(pipe, "put /drop/input/any/10.0.0.5").unwrap();
        rfw.restart();
        await_true("the line is done when rfw is back", SLACK + 5, || lab.rules().len() == 5);
        drop(pipe);
        assert_eq!(child.wait().unwrap().code(), Some(0));
    });
}

#[test]
fn batch_continues_while_one_server_is_down() {
    once(|lab| {
        let _rfw = lab.start("local.server");
        let hung = stand_in(&[STALL]);
        let gone = "http://127.0.0.1:1";
        let options = format!("--server {} --server {gone} --server {LOCAL_URL}", hung.url);
        let begun = Instant::now();
        let (status, out, err) =
            batch(&format!("{options} --timeout 2"), put_lines(300).as_bytes());
        assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
        assert_eq!((status, lab.rules().len()), (1, 300));
        for (url, words) in [(&*hung.url, "no response in time"), (gone, "cannot connect to")] {
            let numbers = failed_lines(&out, url, words);
            assert_eq!(numbers, (1..=300).collect::<Vec<_>>(), "{url}: each line, once");
        }
        let mut failed: Vec<_> = err.lines().collect();
        failed.sort_unstable();
        let mut want = vec![gone, &hung.url];
        want.sort_unstable();
        assert_eq!((failed, out.lines().count()), (want, 600));
    });
}

#[test]
fn batch_loses_no_line_when_more_wait_than_a_queue_holds() {
    once(|_| {
        let (count, gone) = (100_500, "http://127.0.0.1:1");
        let lines = put_lines(count);
        let (status, out, err) = batch(&format!("--server {gone} --timeout 1"), lines.as_bytes());
        assert_eq!((status, err), (1, format!("{gone}\n")));
        let failed = failed_lines(&out, gone, "cannot connect to");
        assert_eq!(failed, (1..=count).collect::<Vec<_>>(), "each line, once");
    });
}

// --- A fleet ---------------------------------------------------------------------------------------

/// ```text
///   this test, the client          r1, r2, r3, hosts with rfw, each on its own wire
///   10.0.N.2  vN ----------------- eth0  10.0.N.1
/// ```
const FLEET: &str = "
    for n in 1 2 3; do
        ip netns add r$n; ip link add v$n type veth peer eth0 netns r$n
        ip addr add 10.0.$n.2/24 dev v$n; ip link set v$n up
        ip -n r$n addr add 10.0.$n.1/24 dev eth0; ip -n r$n link set eth0 up; ip -n r$n link set lo up
        rfwgen 10.0.$n.1 keys
        echo 10.0.$n.2 >> white.list
    done";

#[test]
fn a_fleet_of_real_servers() {
    both(|lab| {
        let rfwgen = concat!(env!("CARGO_MANIFEST_DIR"), "/contrib/rfwgen");
        sh(&format!("cd lab; {}", FLEET.replace("rfwgen", rfwgen)));
        let start = |n: u8| {
            let conf = tls::CONF.replace("127.0.0.1", &format!("10.0.{n}.1"));
            let whitelist = "whitelist.file = white.list";
            let iptables = lab.iptables_path();
            lab.write(
                &format!("r{n}.conf"),
                &format!("[config]\n{conf}\n{whitelist}\niptables.path = {iptables}\n"),
            );
            let rfw = env!("CARGO_BIN_EXE_rfw");
            Process::start(&format!(
                "nsenter --net=/run/netns/r{n} {rfw} -f /run/lab/r{n}.conf --logfile /run/lab/r{n}.log"
            ))
        };
        let mut rfws = [1, 2, 3].map(|n| Some(start(n)));
        credentials(lab, SECRET);
        lab.write("servers", "https://10.0.1.1\nhttps://10.0.2.1\nhttps://10.0.3.1:7393\n");
        lab.write("list", "203.0.113.0/28\n203.0.113.99\n");
        let ask = |servers: &str, more: &str| {
            let fixed = "--credentials secret --cacert keys/client/ca.crt --timeout 10";
            rfwc(&format!("--servers {servers} {fixed} {more}"))
        };
        // The servers are still starting: refused connections are retried.
        let (status, out, err) = ask("servers", "put /drop/input/any --list list");
        assert_eq!(
            (status, &*err, out.matches(": 200 applied: inserted 2,").count()),
            (0, "", 3),
            "{out}"
        );
        rfws[1] = None;
        let delete = "delete /drop/input/any/203.0.113.99";
        let (status, out, err) = ask("servers", delete);
        assert_eq!(
            (status, &*err, out.matches(": 200 deleted").count()),
            (1, "https://10.0.2.1\n", 2),
            "{out}"
        );
        lab.write("failed", &err);
        rfws[1] = Some(start(2));
        assert_eq!(
            ask("failed", delete),
            (0, "https://10.0.2.1: 200 deleted\n".into(), String::new())
        );
        let (status, out, _) = ask("servers", "get /list/input");
        assert_eq!((status, out.matches("203.0.113.0/28").count(), out.lines().count()), (0, 3, 3));
    });
}
