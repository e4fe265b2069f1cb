//! The outward server: TLS with keys made by contrib/rfwgen, credentials, and who may connect.

use crate::faults::{held, trace};
use crate::lab::*;
use rfw::http::certificate::Certificate;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::Command;
use std::thread;
use std::time::Duration;

pub const CONF: &str = "outward.server
outward.server.port = 7393
outward.server.ip = ::
outward.server.certfile = keys/server_127.0.0.1/server.crt
outward.server.keyfile = keys/server_127.0.0.1/server.key
auth.username = mu
auth.password = s3cret:pass";

const USER: &str = "-u mu:s3cret:pass";
const SERVER: &str = "https://127.0.0.1:7393";

/// The keys that `rfwgen 127.0.0.1 keys` makes.
pub fn keys(lab: &Lab) {
    rfwgen(lab, "127.0.0.1");
}

fn rfwgen(lab: &Lab, server: &str) {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/contrib/rfwgen");
    sh(&format!("cd {}; '{script}' {server} keys < /dev/null", lab.dir.display()));
}

/// The first bytes of a TLS client: its ClientHello, one record.
pub fn client_hello() -> Vec<u8> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let _client = Process::start(&format!("openssl s_client -connect {address}"));
    let (mut socket, _) = listener.accept().unwrap();
    let mut hello = vec![0; 5];
    socket.read_exact(&mut hello).unwrap();
    let length = usize::from(u16::from_be_bytes([hello[3], hello[4]]));
    hello.resize(5 + length, 0);
    socket.read_exact(&mut hello[5..]).unwrap();
    hello
}

/// Sends one request with curl over TLS and returns the response in brief.
fn https(options: &str, request: &str) -> String {
    let said = curl(&format!("--cacert /run/lab/keys/client/ca.crt {options}"), request, SERVER);
    let (body, status) = said.rsplit_once('\n').unwrap_or(("", &said));
    let answer = Answer { status: 0, head: String::new(), body: body.into() };
    format!("{status} {}{}", answer.field("result"), answer.field("error"))
}

#[test]
fn curl_over_https() {
    both(|lab| {
        keys(lab);
        let _rfw = lab.start(CONF);
        let put = "PUT /drop/input/any/1.2.3.4";
        let http10 = format!("--http1.0 {USER}"); // curl then offers no other protocol
        let rows = [
            (put, USER, "200 inserted"),
            (put, USER, "200 exists"),
            (put, &http10, "200 exists"),
            ("PUT /drop/input/any/2001:db8::1?expire=1h", USER, "200 inserted"),
            ("PUT /drop/input/any/127.0.0.1", USER, "409 whitelisted"),
            (put, "", "401 unauthorized"),
            (put, "-u mu:", "401 unauthorized"),
            (put, "-u mu:s3cret:pas", "401 unauthorized"),
            (put, "-u mu:s3cret:passs", "401 unauthorized"),
            (put, "-u MU:s3cret:pass", "401 unauthorized"),
            (put, "-H Authorization:Bearer", "401 unauthorized"),
            ("GET /", "", "401 unauthorized"),
            ("GET /nothing", "", "401 unauthorized"),
            ("FOO /list", "", "401 unauthorized"),
            ("DELETE /drop/input/any/1.2.3.4", USER, "200 deleted"),
        ];
        for (request, options, answer) in rows {
            assert_eq!(https(options, request), answer, "{request} {options}");
        }
        let head = curl("-k -i", "GET /", SERVER).to_lowercase();
        assert!(head.contains("\r\nwww-authenticate: basic realm=\"rfw\"\r\n"), "{head}");
        let list = curl(&format!("-k {USER}"), "GET /list", "https://[::1]:7393");
        // No guard: the digits of the port may also be in the time of expiry.
        let rows = list.matches("\"source\":").count();
        assert!(list.contains("2001:db8::1") && rows == 1, "{list}");
        let files = ["rfw.log", "stderr"].map(|name| lab.read(name)).concat();
        for secret in ["s3cret", "bXU6"] {
            assert!(!files.contains(secret), "{files}");
        }
        for word in [" 127.0.0.1 mu \"PUT /", "\" 401 unauthorized ", "2001:db8::1"] {
            assert!(files.contains(word), "{word}: {files}");
        }
    });
}

/// The protocol that `openssl s_client` gets with these options, or "refused".
fn s_client(options: &str) -> String {
    let words = format!(
        "s_client -connect 127.0.0.1:7393 -CAfile /run/lab/keys/client/ca.crt \
         -verify_return_error -verify_ip 127.0.0.1 -brief {options}"
    );
    let mut command = Command::new("openssl");
    let out = command.args(words.split_whitespace()).stdin(std::process::Stdio::null()).output();
    let said = text(&out.expect("openssl is needed"));
    let version = said.lines().find_map(|line| line.strip_prefix("Protocol version: "));
    version.unwrap_or("refused").into()
}

/// Waits until this many handshakes that failed for a reason are logged: the client knows it earlier.
fn await_handshakes(lab: &Lab, reason: &str, count: usize) {
    await_true(reason, SLACK, || lab.read("rfw.log").matches(reason).count() >= count);
}

#[test]
fn protocol_versions() {
    once(|lab| {
        keys(lab);
        let old = "-tls1_1 -cipher ALL:@SECLEVEL=0";
        let mut rfw = lab.start(&format!("local.server\n{CONF}"));
        for (options, version, logged) in
            [("-tls1_3", "TLSv1.3", 0), ("-tls1_2", "refused", 1), (old, "refused", 2)]
        {
            assert_eq!(s_client(options), version, "{options}");
            let warning = "WARNING 127.0.0.1: TLS handshake failed: the client supports only \
                           older versions of TLS; rfw accepts TLS 1.3, and TLS 1.2 if \
                           outward.server.tls12 is set\n";
            await_handshakes(lab, warning, logged);
            let log = lab.log();
            assert_eq!(log.matches(warning).count(), logged, "{options}\n{log}");
            assert_eq!(log.matches("WARNING").count(), logged, "{options}\n{log}");
        }
        rfw.kill();
        let _rfw = lab.start(&format!("{CONF}\noutward.server.tls12"));
        table(&[("", "TLSv1.3"), ("-tls1_2", "TLSv1.2"), (old, "refused")], s_client);
        assert_eq!(https(&format!("--tls-max 1.2 {USER}"), "GET /list"), "200 ");
    });
}

#[test]
fn an_http_request_to_the_https_port_gets_advice() {
    once(|lab| {
        keys(lab);
        let _rfw = lab.start(CONF);
        let message = "This port speaks HTTPS; use https:// instead of http://.";
        let answer = format!("{{\"error\":\"bad_request\",\"message\":\"{message}\"}}\n400");
        let upload = "-T /run/lab/big";
        lab.write("big", &"1.2.3.4\n".repeat(1_000_000));
        for (options, request) in [(USER, "GET /list"), (upload, "PUT /drop/input/any")] {
            assert_eq!(curl(options, request, "http://127.0.0.1:7393"), answer, "{request}");
        }
        let rfwc = sh(&format!(
            "{} client --server http://127.0.0.1:7393 get /list 2>&1 || true",
            env!("CARGO_BIN_EXE_rfw")
        ));
        assert!(rfwc.contains(message), "{rfwc}");
        assert_eq!(https(USER, "GET /list"), "200 ");
    });
}

/// Each reason is logged with advice, and no more of them than a person can read.
#[test]
fn failed_handshakes_are_logged() {
    once(|lab| {
        keys(lab);
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/contrib/rfwgen");
        sh(&format!("cd lab; '{script}' --client alice other < /dev/null"));
        let ca = "outward.server.clientca = keys/client/ca.crt";
        let mut rfw = lab.start(&format!("local.server\n{CONF}\n{ca}"));
        let alice = "/run/lab/other/client_alice/client";
        let rows = [
            ("-k", "sent no certificate; make one with rfwgen --client NAME, or remove outward."),
            (
                &format!("-k --cert {alice}.crt --key {alice}.key"),
                "certificate is refused (BadSignature); make one with rfwgen --client NAME and",
            ),
        ];
        for (options, reason) in rows {
            lab.clear_log();
            curl(options, "GET /", SERVER);
            await_handshakes(lab, reason, 1);
            let log = lab.log();
            let found = log.matches("WARNING 127.0.0.1: TLS handshake failed: the client").count();
            assert!(found == 1 && log.contains(reason), "{reason}\n{log}");
        }
        rfw.kill();

        lab.clear_log();
        let _rfw = lab.start(&format!("local.server\n{CONF}"));
        curl("", "GET /", SERVER);
        let mut garbage = TcpStream::connect(OUTWARD).unwrap();
        garbage.write_all(&[0; 100]).unwrap();
        drop(garbage.read_to_end(&mut Vec::new()));
        drop(TcpStream::connect(OUTWARD).unwrap()); // closing is not a failure
        s_client("-sigalgs rsa_pss_rsae_sha256");
        for _ in 0..9 {
            s_client("-tls1_2");
        }
        await_handshakes(lab, "TLS handshake failed", 10);
        let log = lab.log();
        for (reason, count) in [
            ("the client rejects the server's certificate (UnknownCA); give it the CA's", 1),
            ("the client does not speak TLS (InvalidContentType)", 1),
            (
                "the client and rfw have no algorithm in common (NoSignatureSchemesInCommon); update",
                1,
            ),
            ("the client supports only older versions of TLS", 7),
            ("", 10),
        ] {
            let line = format!("WARNING 127.0.0.1: TLS handshake failed: {reason}");
            assert_eq!(log.matches(&line).count(), count, "{reason}\n{log}");
        }
        let more = "INFO 127.0.0.1: 2 more handshakes failed within a minute";
        await_true("the rest is counted", 61 + SLACK, || lab.read("rfw.log").contains(more));
    });
}

/// Without a close_notify, a client could not tell the end of a response from a cut.
#[test]
fn responses_end_with_close_notify() {
    once(|lab| {
        keys(lab);
        let _rfw = lab.start(CONF);
        let client = "openssl s_client -quiet -connect 127.0.0.1:7393 2>&1";
        for request in ["GET / HTTP/1.0\\r\\n\\r\\n", "GET\\n\\r\\n\\r\\n"] {
            let said = sh(&format!("printf '{request}' | {client} || true"));
            assert!(said.contains("HTTP/1.1 4") && !said.contains("unexpected eof"), "{said}");
        }
    });
}

#[test]
fn kinds_of_keys() {
    once(|lab| {
        keys(lab);
        let files = "keys/server_127.0.0.1/server";
        let rows = [
            "genrsa -traditional -out key 2048",
            "genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:2048 -out key",
            "ecparam -genkey -noout -name prime256v1 -out key",
            "genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-384 -out key",
            "genpkey -algorithm ED25519 -out key",
        ];
        for words in rows {
            let request = "req -x509 -new -key key -subj /CN=x -addext subjectAltName=IP:127.0.0.1";
            sh(&format!(
                "cd lab; openssl {words} 2>/dev/null; openssl {request} -days 3 -out crt; \
                 cat key > {files}.key; cat crt > {files}.crt; cat crt > keys/client/ca.crt"
            ));
            let _rfw = lab.start(CONF);
            assert_eq!(https(USER, "GET /list"), "200 ", "{words}");
        }
    });
}

#[test]
fn bad_keys_do_not_start() {
    once(|lab| {
        keys(lab);
        lab.configure(CONF);
        let key = "keys/server_127.0.0.1/server.key";
        let rows = [
            ("chmod 666 KEY", "write"),
            ("echo > KEY", "rfw.conf:8: KEY contains no unencrypted private key in PEM format;"),
            ("echo '-----BEGIN PRIVATE KEY-----' > KEY", "rfw.conf:8: KEY is not valid PEM ("),
            (
                "openssl genpkey -algorithm ED25519 > KEY",
                "rfw.conf:8: KEY is not the key of the certificate in outward.server.certfile; \
                 name a pair",
            ),
            (
                "openssl ecparam -genkey -noout -name secp521r1 > KEY",
                "rfw.conf:8: KEY cannot be used with the certificate in outward.server.certfile: ",
            ),
            ("rm KEY", "KEY"),
            (
                "cp KEY CRT",
                "rfw.conf:7: CRT contains no CERTIFICATE block; name a certificate in PEM",
            ),
            (
                "sed -i 2s/M/N/ CRT",
                "rfw.conf:7: CRT contains a damaged certificate; copy the whole",
            ),
        ];
        let crt = &key.replace(".key", ".crt");
        let named = |text: &str| text.replace("KEY", key).replace("CRT", crt);
        for (ill, word) in rows {
            sh(&format!("cd lab; cp {key} good; cp {crt} good.crt; {}", named(ill)));
            let (status, said) = lab.rfw("-t -f rfw.conf");
            assert!(status == 1 && said.contains(&named(word)), "{ill}: {status} {said}");
            sh(&format!("cd lab; rm -f {key}; mv good {key}; mv good.crt {crt}"));
        }
        assert_eq!(lab.rfw("-t -f rfw.conf").0, 0);
    });
}

#[test]
fn only_whitelisted_addresses_may_connect() {
    both(|lab| {
        keys(lab);
        sh("ip addr add 10.9.9.1/32 dev lo; ip addr add 10.9.9.9/32 dev lo");
        lab.write("white.list", "10.9.9.1\n");
        let _rfw = lab.start(CONF);
        let from = |source: &str, seconds: u64| {
            let options = format!("-k {USER} -m {seconds} --interface {source}");
            curl(&options, "GET /list", "https://10.9.9.1:7393")
        };
        assert_eq!(from("10.9.9.1", 20), "[]\n200");
        let stranger = from("10.9.9.9", 2);
        assert!(stranger.contains("timed out"), "dropped, not refused: {stranger}");

        // If another rule lets a stranger's packets through, until rfw's rules are first again, rfw
        // itself closes at once.
        await_true("rfw closes", 10 + SLACK, || {
            lab.iptables("-I INPUT -s 10.9.9.9 -j ACCEPT");
            lab.iptables("-I OUTPUT -d 10.9.9.9 -j ACCEPT");
            let stranger = from("10.9.9.9", 2);
            assert!(stranger.starts_with("000"), "{stranger}");
            !stranger.contains("timed out")
        });
    });
}

#[test]
fn a_silent_handshake_is_closed_and_delays_no_other() {
    once(|lab| {
        keys(lab);
        let _rfw = lab.start(CONF);
        let mut silent = TcpStream::connect(OUTWARD).unwrap();
        assert_eq!(https(USER, "GET /list"), "200 ");
        silent.set_read_timeout(Some(Duration::from_secs(11 + SLACK))).unwrap();
        let mut said = Vec::new();
        assert!(silent.read_to_end(&mut said).is_ok(), "still open");
        assert_eq!(https(USER, "GET /list"), "200 ");
    });
}

#[test]
fn rfwgen_makes_what_it_reports() {
    once(|lab| {
        keys(lab);
        let files = "cd lab; find keys -type f -o -type d | sort | xargs stat -c '%a %n'";
        let made = "700 keys\n700 keys/client\n600 keys/client/ca.crt\n700 keys/offline\n600 keys/offline/ca.key\n\
                    700 keys/server_127.0.0.1\n600 keys/server_127.0.0.1/server.crt\n600 keys/server_127.0.0.1/server.key\n";
        assert_eq!(sh(files), made);
        let shown = sh("openssl x509 -noout -text -in lab/keys/server_127.0.0.1/server.crt");
        assert!(shown.contains("IP Address:127.0.0.1") && shown.contains("prime256v1"), "{shown}");

        let sums = "cd lab; sha256sum keys/*/*";
        let before = sh(sums);
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/contrib/rfwgen");
        sh(&format!("cd lab; '{script}' 127.0.0.1 keys < /dev/null || true"));
        assert_eq!(sh(sums), before, "a key was overwritten");

        rfwgen(lab, "2001:db8::7");
        let after = sh(sums);
        assert!(before.lines().all(|line| after.contains(line)), "one CA for all servers");
        sh("cd lab/keys; openssl verify -CAfile client/ca.crt server_*/server.crt");
        for address in ["1.2.3.400", ":"] {
            sh(&format!("! '{script}' {address} lab/other < /dev/null"));
            sh("test ! -e lab/other");
        }
    });
}

#[test]
fn client_certificates() {
    once(|lab| {
        keys(lab);
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/contrib/rfwgen");
        sh(&format!(
            "cd lab; for at in keys other; do '{script}' --client alice $at < /dev/null; done
             openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=alice -keyout own.key -out own.crt 2>&1"
        ));
        let with = |name: &str| format!("--cert /run/lab/{name}.crt --key /run/lab/{name}.key");
        let mut rows = vec![
            (format!("{} {USER}", with("keys/client_alice/client")), "200 "),
            (with("keys/client_alice/client"), "401 unauthorized"), // a password is required, too
        ];
        for name in ["other/client_alice/client", "own", "keys/server_127.0.0.1/server"] {
            rows.push((format!("{} {USER}", with(name)), "none"));
        }
        rows.push((USER.into(), "none"));
        for flag in ["", "outward.server.tls12"] {
            let ca = "outward.server.clientca = keys/client/ca.crt";
            let mut rfw = lab.start(&format!("local.server\n{CONF}\n{ca}\n{flag}"));
            for (options, want) in &rows {
                for version in ["--tls-max 1.3", "--tls-max 1.2"] {
                    let got = https(&format!("{options} {version}"), "GET /list");
                    let got = if got.trim().is_empty() { "none" } else { &got };
                    let want =
                        if flag.is_empty() && version.ends_with('2') { "none" } else { want };
                    assert_eq!(got, want, "{options} {version} {flag}");
                }
            }
            rfw.kill();
        }
        for (ill, word) in [("rm CA", "ca.crt"), ("echo > CA", "ca.crt"), ("chmod 666 CA", "write")]
        {
            sh(&format!("cd lab; cp keys/client/ca.crt ca.crt; {}", ill.replace("CA", "ca.crt")));
            lab.configure(&format!("{CONF}\noutward.server.clientca = ca.crt"));
            let (status, said) = lab.rfw("-t -f rfw.conf");
            assert!(
                status == 1 && said.contains(word) && said.contains("rfw.conf:"),
                "{ill}: {said}"
            );
        }
    });
}

/// They outlived the client's certificate.
#[test]
fn sessions_are_not_resumed() {
    once(|lab| {
        keys(lab);
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/contrib/rfwgen");
        sh(&format!("cd lab; '{script}' --client alice keys < /dev/null"));
        let ca = "outward.server.clientca = keys/client/ca.crt\noutward.server.tls12";
        let _rfw = lab.start(&format!("local.server\n{CONF}\n{ca}"));
        let alice = "keys/client_alice/client";
        let first = format!("-cert {alice}.crt -key {alice}.key -sess_out session");
        for version in ["-tls1_3", "-tls1_2"] {
            for (options, expected) in [(&*first, 1), ("-sess_in session", 0)] {
                let count = sh(&format!(
                    "cd lab; printf 'GET / HTTP/1.0\\r\\n\\r\\n' |
                     openssl s_client -quiet -connect 127.0.0.1:7393 {version} {options} 2>&1 |
                     grep -c '^HTTP/1.1 401 ' || true"
                ));
                assert_eq!(count.trim(), expected.to_string(), "{version} {options}");
            }
        }
    });
}

#[test]
fn a_peer_that_vanishes_at_any_byte_of_the_handshake_leaks_nothing() {
    once(|lab| {
        keys(lab);
        let rfw = lab.start(&format!("local.server\n{CONF}"));
        rfw.await_idle();
        let before = held(&rfw);
        let hello = client_hello();
        for length in 0..=hello.len() {
            let mut peer = TcpStream::connect(OUTWARD).unwrap();
            peer.write_all(&hello[..length]).unwrap();
            if length % 2 == 0 {
                peer.shutdown(Shutdown::Write).unwrap(); // the response is not read
            }
        }
        await_true("all is let go", 2 + SLACK, || held(&rfw) == before);

        // The bytes after the hello differ each time, so they are cut between curl and rfw.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("https://{}", listener.local_addr().unwrap());
        for length in hello.len()..hello.len() + 90 {
            let asking = thread::spawn({
                let url = url.clone();
                move || curl("-k -m 5", "GET /", &url)
            });
            let (client, _) = listener.accept().unwrap();
            let server = TcpStream::connect(OUTWARD).unwrap();
            thread::scope(|scope| {
                scope.spawn(|| drop(std::io::copy(&mut &server, &mut &client)));
                drop(std::io::copy(&mut (&client).take(length as u64), &mut &server));
                drop(client.shutdown(Shutdown::Both));
                drop(server.shutdown(Shutdown::Both));
            });
            asking.join().unwrap();
        }
        await_true("all is let go again", 2 + SLACK, || held(&rfw) == before);
        assert_eq!(https(USER, "GET /list"), "200 ");
    });
}

#[test]
fn garbage_gets_an_alert_and_is_closed() {
    once(|lab| {
        keys(lab);
        let rfw = lab.start(CONF);
        let hello = client_hello();
        let mut two_hellos = [&hello[..], &hello[..]].concat();
        two_hellos[hello.len() + 20] ^= 1;
        let rows: [(&str, &[u8]); 8] = [
            ("HTTP", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
            ("SSH", b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n"),
            ("SSL 2", b"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10\x01\x00\x80"),
            ("an unknown record", b"\x99\x03\x03\x00\x02\x01\x00"),
            ("a record too long", b"\x16\x03\x01\xff\xff\x01\x00\x00\x00"),
            ("data before the handshake", b"\x17\x03\x03\x00\x05hello"),
            ("an empty hello", b"\x16\x03\x01\x00\x04\x01\x00\x00\x00"),
            ("two hellos", &two_hellos),
        ];
        for (what, bytes) in rows {
            let mut peer = TcpStream::connect(OUTWARD).unwrap();
            peer.set_read_timeout(Some(Duration::from_secs(5 + SLACK))).unwrap();
            peer.write_all(bytes).unwrap();
            let mut said = Vec::new();
            peer.read_to_end(&mut said).unwrap_or_else(|error| panic!("{what}: {error}"));
            if matches!(what, "HTTP" | "SSH") {
                assert!(said.starts_with(b"HTTP/1.1 400 "), "{what}: {said:02x?}");
                continue;
            }
            let alert = |at: &[u8]| at.starts_with(&[0x15, 3, 3, 0, 2, 2]);
            // After the response to a hello, the alert is encrypted: a short record of data.
            let hidden = |at: &[u8]| at.starts_with(&[0x17, 3, 3, 0, 19]);
            let found = if what == "two hellos" {
                said.windows(6).any(|at| alert(at) || hidden(at))
            } else {
                alert(&said)
            };
            assert!(found, "{what}: {said:02x?}");
            assert_eq!(https(USER, "GET /list"), "200 ", "{what}");
        }
        rfw.await_idle();
    });
}

/// Begins a script: newer versions of openssl make a certificate of version 1 only with `req` and `$v1`.
const V1: &str = "
v1=; if openssl req -help 2>&1 | grep -q -e -x509v1; then v1=-x509v1; fi
printf '[req]\ndistinguished_name=n\n[n]\n' > /run/lab/no.conf";

/// The commands of rfwgen in rfw 0.2.2, except that its CA had 4096 bits, and for `$v1`.
const OLD_RFWGEN: &str = "
cd lab; mkdir -p keys/offline keys/client keys/server_127.0.0.1; cd keys
openssl req -new $v1 -newkey rsa:2048 -days 7305 -nodes -x509 -sha1 -keyout offline/ca.key -out client/ca.crt OPTIONS \
    -subj '/C=IE/ST=Universe/L=Internet/O=rfw root CA 2014-07-01 12:00:00' 2>&1
cd server_127.0.0.1; openssl genrsa -out server.key 2048 2>&1
openssl req -new -subj '/C=IE/ST=Universe/L=Internet/O=Server 127.0.0.1/CN=127.0.0.1' -key server.key -out server.csr
sign='-days 7305 -in server.csr -CA ../client/ca.crt -CAkey ../offline/ca.key -set_serial 01 -out server.crt'
if [ $v1 ]; then openssl req -x509 $v1 -config ../../no.conf $sign; else openssl x509 -req $sign; fi 2>&1
chmod 600 server.key";

/// rustls rejects version 1 certificates. With the CA of 0.2.2, rfwgen makes one that existing
/// clients accept.
#[test]
fn certificates_of_rfw_0_2_2() {
    once(|lab| {
        // The default configuration of openssl gives the CA its extensions.
        let old_rfwgen = |options| sh(&format!("{V1}{}", OLD_RFWGEN.replace("OPTIONS", options)));
        old_rfwgen("-config ../no.conf");
        sh("openssl x509 -in lab/keys/client/ca.crt -noout -text | grep 'Version: 1 '");
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/contrib/rfwgen");
        sh(&format!("cd lab/keys; '{script}' -f 127.0.0.1 < /dev/null; rm -r ../keys"));
        old_rfwgen("");
        sh("cp lab/keys/client/ca.crt lab/clients.crt");
        lab.configure(CONF);
        let (status, said) = lab.rfw("-t -f rfw.conf");
        let advice = "rfw.conf:7: keys/server_127.0.0.1/server.crt is an X.509 version 1 certificate, \
                      as made by rfw 0.2.2; run rfwgen -f ADDRESS in the directory with its \
                      offline/ca.key and client/ca.crt, and install the new key and certificate \
                      (clients keep their ca.crt)\n";
        assert!(status == 1 && said.ends_with(advice), "{said}");

        sh(&format!("cd lab/keys; '{script}' -f 127.0.0.1 < /dev/null"));
        let _rfw = lab.start(CONF);
        let listed = curl(&format!("--cacert /run/lab/clients.crt {USER}"), "GET /list", SERVER);
        assert_eq!(listed, "[]\n200");
    });
}

/// Makes a new server certificate with these dates (YYYYMMDDHHMMSSZ), of version 1 if `ext` is empty.
fn make_certificate(from: &str, to: &str) {
    sh(&format!(
        "{V1}
         cd lab; key=keys/server_127.0.0.1/server.key crt=keys/server_127.0.0.1/server.crt
         if [ $v1 ] && [ ! -s ext ]; then
             openssl req -x509 $v1 -config no.conf -key $key -subj /CN=x -out $crt -CA keys/client/ca.crt \
                 -CAkey keys/offline/ca.key -not_before {from} -not_after {to}
             exit
         fi
         : > index; printf '[ca]\ndefault_ca=x\n[x]\ndatabase=index\nnew_certs_dir=.
         default_md=sha256\npolicy=p\nrand_serial=yes\n[p]\ncommonName=supplied\n' > ca.conf
         openssl req -new -key $key -subj /CN=x -out csr
         openssl ca -batch -notext -config ca.conf -in csr -out $crt \
             -extfile ext -startdate {from} -enddate {to} \
             -cert keys/client/ca.crt -keyfile keys/offline/ca.key 2>&1"
    ));
}

#[test]
fn expiring_certificates_are_reported() {
    let strace = has_strace("tls::expiring_certificates_are_reported");
    once(|lab| {
        keys(lab);
        lab.write("ext", "subjectAltName=IP:127.0.0.1\n");
        let file = "keys/server_127.0.0.1/server.crt: the certificate";
        for (days, want) in
            [(31, None), (29, Some(("WARNING", "expires"))), (-1, Some(("ERROR", "expired")))]
        {
            let expires = now().saturating_add_signed(days * 86_400);
            let date = |format: &str| sh(&format!("date -u -d @{expires} +{format}")).trim().into();
            let (digits, shown): (String, String) = (date("%Y%m%d%H%M%SZ"), date("%FT%T.000Z"));
            make_certificate("20200101000000Z", &digits);
            let notice = want.map_or(String::new(), |(level, verb)| {
                let advice = "make a new one with rfwgen -f, install it and restart rfw";
                format!("{level}: {file} {verb} at {shown}; {advice}\n")
            });
            lab.configure(CONF);
            let (status, said) = lab.rfw("-t -f rfw.conf");
            assert!(status == 0 && said.starts_with(&notice), "{said}");
            assert_eq!(said.contains("certificate"), want.is_some(), "{said}");

            lab.clear_log();
            let mut rfw = lab.start(&format!("local.server\n{CONF}"));
            let logged = notice.replacen(':', "", 1);
            let count = |log: String| match want {
                None => usize::from(log.contains(file)),
                Some(_) => log.matches(&logged).count(),
            };
            assert_eq!(count(lab.log()), usize::from(want.is_some()), "{}", lab.log());
            let metric = format!("\nrfw_certificate_expires_timestamp_seconds {expires}\n");
            let text = ask("GET /metrics").body;
            assert!(text.contains(&metric), "{text}");
            assert_eq!(https(&format!("-k {USER}"), "GET /list"), "200 ", "expired or not");
            if strace && days == 29 {
                // Sleeping takes no time here, so a day passes at once.
                let sleep = "-e trace=clock_nanosleep -e inject=clock_nanosleep:retval=0";
                let _tracer = trace(&rfw, &format!("-o /dev/null {sleep}"));
                await_true("it is reported each day", 120, || count(lab.read("rfw.log")) > 1);
            }
            rfw.kill();
        }
        let _rfw = lab.start("local.server");
        let text = ask("GET /metrics").body;
        assert!(!text.contains("certificate"), "{text}");
    });
}

/// The first certificate to expire counts, wherever it is in the chain.
#[test]
fn dates_and_versions_as_openssl_reads_them() {
    once(|lab| {
        keys(lab);
        let crt = "keys/server_127.0.0.1/server.crt";
        let check = |what: &str, version: u8| {
            sh(&format!("openssl x509 -in lab/{crt} -outform DER -out lab/der"));
            let date = sh(&format!(
                "date +%s -d \"$(openssl x509 -in lab/{crt} -noout -enddate | cut -d= -f2)\""
            ));
            let expires = Duration::from_secs(date.trim().parse().unwrap());
            let der = std::fs::read(lab.dir.join("der")).unwrap();
            assert_eq!(Certificate::parse(&der), Some(Certificate { version, expires }), "{what}");
            for at in 0..der.len() {
                let mut damaged = der.clone();
                damaged[at] ^= 1 << (at % 8);
                let _ = Certificate::parse(&damaged); // any result but a panic
                assert_eq!(Certificate::parse(&der[..at]), None, "{what}: {at} bytes");
            }
        };
        check("rfwgen", 3);
        for (ext, version) in [("subjectAltName=IP:127.0.0.1\n", 3), ("", 1)] {
            lab.write("ext", ext);
            for to in [
                "20260101000000Z",
                "491231235959Z",
                "20500101000000Z",
                "21000228235959Z",
                "99991231235959Z",
            ] {
                make_certificate("19700101000000Z", to);
                check(to, version);
            }
        }
        for key in ["rsa:4096", "rsa:1024", "ED25519", "ec -pkeyopt ec_paramgen_curve:P-384"] {
            let request = "openssl req -x509 -days 40000 -nodes -keyout key -subj /CN=x";
            sh(&format!("cd lab; {request} -newkey {key} -out {crt} 2>&1"));
            check(key, 3);
        }

        lab.write("ext", "subjectAltName=IP:127.0.0.1\n");
        make_certificate("20200101000000Z", "20490101000000Z");
        sh(&format!("cd lab; cat keys/client/ca.crt >> {crt}"));
        let _rfw = lab.start(&format!("local.server\n{CONF}"));
        let ca = sh(
            "date +%s -d \"$(openssl x509 -in lab/keys/client/ca.crt -noout -enddate | cut -d= -f2)\"",
        );
        let text = ask("GET /metrics").body;
        assert!(text.contains(&format!("_timestamp_seconds {ca}")), "{text}");
    });
}
