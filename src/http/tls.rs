//! TLS: the only file that names rustls.

use super::certificate::Certificate;
use super::deadline::DeadlineSocket;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, ClientConnection, Error, InconsistentKeys,
    PeerIncompatible, RootCertStore, ServerConfig, ServerConnection, StreamOwned, version,
};
use std::io::{self, ErrorKind, Read, Write};
use std::sync::Arc;
use std::time::Duration;

/// The server's side of one TLS connection.
pub type Session = StreamOwned<ServerConnection, DeadlineSocket>;

/// What every connection of the outward server starts from.
#[derive(Debug)]
pub struct Acceptor {
    config: Arc<ServerConfig>,
    /// When the first certificate of the chain expires, as Unix time.
    pub expires: Duration,
}

/// One of the files.
#[derive(PartialEq, Eq, Debug)]
pub enum Part {
    Chain,
    Key,
    ClientCa,
}

impl Acceptor {
    /// Takes a PEM chain and its private key (PKCS#1, PKCS#8 or SEC1); with a
    /// client CA, only clients with a certificate from it get through. The error
    /// is a sentence, and which of the files is wrong.
    pub fn new(
        chain: &[u8],
        key: &[u8],
        client_ca: Option<&[u8]>,
        tls12: bool,
    ) -> Result<Acceptor, (Part, String)> {
        let chain = certificates(chain).map_err(|why| (Part::Chain, why))?;
        let expires = check_chain(&chain).map_err(|why| (Part::Chain, why))?;
        let key = private_key(key).map_err(|why| (Part::Key, why))?;
        let versions: &[_] = match tls12 {
            true => &[&version::TLS13, &version::TLS12],
            false => &[&version::TLS13],
        };
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = match client_ca {
            None => WebPkiClientVerifier::no_client_auth(),
            Some(pem) => {
                let wrong = |why: String| (Part::ClientCa, why);
                let roots = roots(pem).map_err(wrong)?;
                WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone())
                    .build()
                    .map_err(|error| wrong(error.to_string()))?
            }
        };
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .map_err(|error| (Part::Key, error.to_string()))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(|error| (Part::Key, unusable(&error, "outward.server.certfile")))?;
        config.ignore_client_order = true;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Acceptor { config: Arc::new(config), expires })
    }

    /// Starts TLS on a connection; the handshake is made by the first read.
    pub fn session(&self, socket: DeadlineSocket) -> io::Result<Session> {
        let connection = ServerConnection::new(self.config.clone()).map_err(io::Error::other)?;
        Ok(StreamOwned::new(connection, socket))
    }
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let certificates: Vec<_> = rustls_pemfile::certs(&mut &pem[..])
        .collect::<Result<_, _>>()
        .map_err(|error| format!("is not valid PEM ({error}); copy the whole file again"))?;
    match certificates.is_empty() {
        true => Err("contains no CERTIFICATE block; name a certificate in PEM format".into()),
        false => Ok(certificates),
    }
}

/// When the first of them expires. rustls refuses version 1 too, but gives no reason.
fn check_chain(chain: &[CertificateDer<'_>]) -> Result<Duration, String> {
    let chain = chain.iter().map(|der| Certificate::parse(der)).collect::<Option<Vec<_>>>();
    let chain = chain
        .ok_or("contains a damaged certificate; copy the whole file again or make a new one")?;
    if let Some(Certificate { version: version @ ..3, .. }) = chain.first() {
        return Err(format!(
            "is an X.509 version {version} certificate, as made by rfw 0.2.2; run rfwgen -f ADDRESS in \
             the directory with its offline/ca.key and client/ca.crt, and install the new key and \
             certificate (clients keep their ca.crt)"
        ));
    }
    Ok(chain.iter().map(|certificate| certificate.expires).min().unwrap_or_default())
}

/// Why a private key cannot be used with the certificate of this option.
fn unusable(error: &Error, certificate: &str) -> String {
    match error {
        Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
            format!("is not the key of the certificate in {certificate}; name a pair")
        }
        _ => format!("cannot be used with the certificate in {certificate}: {error}"),
    }
}

fn private_key(pem: &[u8]) -> Result<PrivateKeyDer<'static>, String> {
    let is_encrypted = pem.windows(9).any(|word| word == b"ENCRYPTED");
    let key = rustls_pemfile::private_key(&mut &pem[..]).or_else(|error| match is_encrypted {
        true => Ok(None),
        false => Err(format!("is not valid PEM ({error}); copy the whole file again")),
    });
    key?.ok_or_else(|| {
        "contains no unencrypted private key in PEM format; 'openssl pkey' decrypts one".into()
    })
}

fn roots(pem: &[u8]) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(pem)? {
        let refused = |error| format!("contains a certificate that no CA can have: {error}");
        roots.add(certificate).map_err(refused)?;
    }
    Ok(roots)
}

/// Tells the peer that nothing more comes (RFC 8446, 6.1).
pub fn close(session: &mut Session) {
    session.conn.send_close_notify();
    let _ = session.conn.complete_io(&mut session.sock);
}

/// The client's side of one TLS connection.
pub struct Link(StreamOwned<ClientConnection, DeadlineSocket>);

/// What every connection of the client starts from. There is no way to make one
/// that does not check certificates.
pub struct Connector(Arc<ClientConfig>);

impl Connector {
    /// Trusts the CAs of a PEM file, or else those that browsers trust; with a PEM
    /// chain and its key, shows this certificate to servers that ask for one. rfw
    /// always speaks TLS 1.3. The error is a sentence.
    pub fn new(ca: Option<&[u8]>, pair: Option<(&[u8], &[u8])>) -> Result<Connector, String> {
        let of = |option: &'static str| move |why| format!("{option}: this file {why}");
        let mut roots = ca.map_or(Ok(RootCertStore::empty()), roots).map_err(of("--cacert"))?;
        if ca.is_none() {
            roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&version::TLS13])
            .map_err(|error| error.to_string())?
            .with_root_certificates(roots);
        let config = match pair {
            None => config.with_no_client_auth(),
            Some((chain, key)) => config
                .with_client_auth_cert(
                    certificates(chain).map_err(of("--cert"))?,
                    private_key(key).map_err(of("--key"))?,
                )
                .map_err(|error| of("--key")(unusable(&error, "--cert")))?,
        };
        Ok(Connector(Arc::new(config)))
    }

    /// Starts TLS with a host name or address; the handshake is made by the first write.
    pub fn link(&self, host: &str, socket: DeadlineSocket) -> io::Result<Link> {
        let name = ServerName::try_from(host.to_string()).map_err(io::Error::other)?;
        let connection = ClientConnection::new(self.0.clone(), name).map_err(io::Error::other)?;
        Ok(Link(StreamOwned::new(connection, socket)))
    }
}

impl Read for Link {
    /// Not as `StreamOwned` does it, which would first send what is left of a request that the
    /// server does not take, and so never come to the answer that says why.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let StreamOwned { conn, sock } = &mut self.0;
        loop {
            let state = conn.process_new_packets();
            state.map_err(|error| io::Error::new(ErrorKind::InvalidData, error))?;
            match conn.reader().read(buffer) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                result => return result,
            }
            conn.read_tls(sock)?;
        }
    }
}

impl Write for Link {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// The server's side: why a handshake failed and what to do, if TLS failed and not the connection.
pub fn handshake_complaint(error: &io::Error) -> Option<String> {
    use {AlertDescription as Alert, PeerIncompatible as Peer};
    Some(match error.get_ref()?.downcast_ref()? {
        Error::PeerIncompatible(
            Peer::SupportedVersionsExtensionRequired
            | Peer::SignatureAlgorithmsExtensionRequired
            | Peer::Tls12NotOffered
            | Peer::Tls12NotOfferedOrEnabled,
        ) => "the client supports older versions of TLS only; rfw accepts TLS 1.3, and TLS 1.2 if \
              outward.server.tls12 is set"
            .into(),
        Error::AlertReceived(
            alert @ (Alert::UnknownCA
            | Alert::BadCertificate
            | Alert::CertificateExpired
            | Alert::CertificateUnknown
            | Alert::UnsupportedCertificate),
        ) => format!(
            "the client rejects the server's certificate ({alert:?}); give it the CA's certificate \
             (curl --cacert ca.crt), and check the certificate's address and dates"
        ),
        Error::NoCertificatesPresented => "the client sent no certificate; make one with rfwgen \
             --client NAME, or remove outward.server.clientca"
            .into(),
        Error::InvalidCertificate(why) => format!(
            "the client's certificate is refused ({why}); make one with rfwgen --client NAME and \
             the CA of outward.server.clientca"
        ),
        Error::InvalidMessage(why) => format!("the client does not speak TLS ({why:?})"),
        other => format!("{other}"),
    })
}

/// The client's side: what is wrong, in a sentence, if it is TLS that failed and not the connection.
pub fn complaint(error: &io::Error) -> Option<String> {
    use AlertDescription as Alert;
    Some(match error.get_ref()?.downcast_ref()? {
        Error::InvalidCertificate(why) => certificate_complaint(why),
        Error::AlertReceived(Alert::CertificateRequired) => {
            "the server asks for a client's certificate; give it with --cert and --key".into()
        }
        Error::AlertReceived(
            alert @ (Alert::UnknownCA
            | Alert::DecryptError
            | Alert::BadCertificate
            | Alert::CertificateExpired
            | Alert::CertificateUnknown
            | Alert::UnsupportedCertificate),
        ) => format!("the server refuses the certificate of --cert ({alert:?})"),
        Error::InvalidMessage(_) => "the server does not speak TLS".into(),
        other => format!("no TLS 1.3 with this server: {other}"),
    })
}

fn certificate_complaint(why: &CertificateError) -> String {
    use CertificateError as Why;
    let what = match why {
        Why::Expired | Why::ExpiredContext { .. } => "has expired, or the clock here is wrong",
        Why::NotValidYet | Why::NotValidYetContext { .. } => {
            "is not valid yet, or the clock here is wrong"
        }
        Why::UnknownIssuer | Why::BadSignature => {
            "is not from a CA that is trusted here (see --cacert); it may be self-signed"
        }
        Why::NotValidForNameContext { presented, .. } if presented.is_empty() => {
            "names no host: it has no subjectAltName"
        }
        Why::NotValidForNameContext { expected, presented } => {
            let names = presented.join(", ");
            return format!(
                "the server's certificate is for {names}, not for {}",
                expected.to_str()
            );
        }
        Why::InvalidPurpose | Why::InvalidPurposeContext { .. } => {
            "is not for a server: its extendedKeyUsage lacks serverAuth"
        }
        Why::Other(error) if error.to_string() == "CaUsedAsEndEntity" => {
            "is a CA's own, self-signed perhaps, and not a server's"
        }
        other => return format!("the server's certificate is refused: {other}"),
    };
    format!("the server's certificate {what}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::OtherError;

    #[test]
    fn files_that_hold_nothing() {
        let (part, why) = Acceptor::new(b"", b"", None, false).unwrap_err();
        let none = "contains no CERTIFICATE block; name a certificate in PEM format";
        assert_eq!((part, &*why), (Part::Chain, none));
        let wrong = Connector::new(Some(b""), None).map(|_| ());
        assert_eq!(wrong, Err(format!("--cacert: this file {none}")));
        assert!(Connector::new(None, None).is_ok());
    }

    /// The two forms of openssl: `openssl ec -aes128`, `openssl pkey -aes128`.
    #[test]
    fn an_encrypted_key_is_not_a_damaged_one() {
        for head in ["EC PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED", "ENCRYPTED PRIVATE KEY-----"] {
            let tail = head.split("-----").next().unwrap();
            let pem = format!("-----BEGIN {head}\n\nU255\n-----END {tail}-----\n");
            let error = private_key(pem.as_bytes()).unwrap_err();
            assert!(error.contains("'openssl pkey' decrypts"), "{head}: {error}");
        }
        let error = private_key(b"-----BEGIN PRIVATE KEY-----\nU2").unwrap_err();
        assert!(error.contains("copy the whole file"), "{error}");
    }

    /// tests/e2e/client.rs has real certificates; here are the sentences that those do not reach.
    #[test]
    fn complaints() {
        let certificate = |why| Error::InvalidCertificate(why);
        let names = |presented: &[&str]| {
            let presented = presented.iter().map(|name| name.to_string()).collect();
            let expected = ServerName::try_from("b").unwrap();
            certificate(CertificateError::NotValidForNameContext { expected, presented })
        };
        let other = |what: &'static str| {
            let error = OtherError(Arc::new(io::Error::other(what)));
            certificate(CertificateError::Other(error))
        };
        let table = [
            (certificate(CertificateError::Expired), "has expired"),
            (certificate(CertificateError::NotValidYet), "not valid yet"),
            (certificate(CertificateError::BadSignature), "not from a CA that is trusted here"),
            (certificate(CertificateError::InvalidPurpose), "serverAuth"),
            (certificate(CertificateError::Revoked), "certificate is refused: "),
            (names(&[]), "certificate names no host: it has no subjectAltName"),
            (names(&["a", "c"]), "certificate is for a, c, not for b"),
            (other("CaUsedAsEndEntity"), "is a CA's own"),
            (other("MaximumPathDepthExceeded"), "certificate is refused: "),
            (Error::AlertReceived(AlertDescription::CertificateRequired), "asks for a client's"),
            (Error::AlertReceived(AlertDescription::UnknownCA), "--cert (UnknownCA)"),
            (Error::AlertReceived(AlertDescription::InternalError), "no TLS 1.3 with"),
        ];
        for (error, words) in table {
            let said = complaint(&io::Error::other(error)).unwrap();
            assert!(said.contains(words), "{said}");
        }
        for other in [io::Error::other("x"), ErrorKind::BrokenPipe.into()] {
            assert_eq!(complaint(&other), None);
        }
    }
}
