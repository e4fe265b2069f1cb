//! TLS: the only file that names rustls.

use super::certificate::Certificate;
use super::deadline::DeadlineSocket;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{
    AlertDescription, CertificateError, ClientConfig, ClientConnection, Error, InconsistentKeys,
    PeerIncompatible, RootCertStore, ServerConfig, ServerConnection, StreamOwned, version,
};
use std::io::{self, ErrorKind, Read, Write};
use std::sync::Arc;
use std::time::Duration;

/// The server's side of one TLS connection.
pub type Session = StreamOwned<ServerConnection, DeadlineSocket>;

/// The TLS settings of the outward server.
#[derive(Debug)]
pub struct Acceptor {
    config: Arc<ServerConfig>,
    /// When the first certificate of the chain expires, as Unix time.
    pub expires: Duration,
}

/// The file that an error is about.
#[derive(PartialEq, Eq, Debug)]
pub enum Part {
    Chain,
    Key,
    ClientCa,
}

impl Acceptor {
    /// Takes a PEM chain and its private key (PKCS#1, PKCS#8 or SEC1). With a client CA, only
    /// clients with a certificate from it are accepted. The error names the invalid file and the
    /// problem.
    pub fn new(
        chain: &[u8],
        key: &[u8],
        client_ca: Option<&[u8]>,
        tls12: bool,
    ) -> Result<Acceptor, (Part, String)> {
        let chain = certificates(chain).map_err(|problem| (Part::Chain, problem))?;
        let expires = check_chain(&chain).map_err(|problem| (Part::Chain, problem))?;
        let key = private_key(key).map_err(|problem| (Part::Key, problem))?;
        let versions: &[_] = match tls12 {
            true => &[&version::TLS13, &version::TLS12],
            false => &[&version::TLS13],
        };
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = match client_ca {
            None => WebPkiClientVerifier::no_client_auth(),
            Some(pem) => {
                let roots = roots(pem).map_err(|problem| (Part::ClientCa, problem))?;
                WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone())
                    .build()
                    .map_err(|error| (Part::ClientCa, error.to_string()))?
            }
        };
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .map_err(|error| (Part::Key, error.to_string()))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(|error| (Part::Key, unusable(&error, "outward.server.certfile")))?;
        config.ignore_client_order = true;
        // A resumed session would not check again whether the client's certificate has expired.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.alpn_protocols = vec![b"http/1.1".to_vec(), b"http/1.0".to_vec()];
        Ok(Acceptor { config: Arc::new(config), expires })
    }

    /// Starts TLS on a connection; the first read performs the handshake.
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

/// Returns when the first certificate expires. rustls rejects version 1, too, but gives no reason.
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
        let invalid = |error| format!("contains an invalid CA certificate: {error}");
        roots.add(certificate).map_err(invalid)?;
    }
    Ok(roots)
}

/// The client's side of one TLS connection.
pub struct Link(StreamOwned<ClientConnection, DeadlineSocket>);

/// The TLS settings of the client, which always checks certificates.
pub struct Connector(Arc<ClientConfig>);

impl Connector {
    /// Trusts the CAs of a PEM file or, without one, those that browsers trust. `pair` is the PEM
    /// chain and key for servers that request a certificate. rfw always supports TLS 1.3. The error
    /// is a sentence.
    pub fn new(ca: Option<&[u8]>, pair: Option<(&[u8], &[u8])>) -> Result<Connector, String> {
        let in_file =
            |option: &'static str| move |problem| format!("{option}: this file {problem}");
        let mut roots =
            ca.map_or(Ok(RootCertStore::empty()), roots).map_err(in_file("--cacert"))?;
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
                    certificates(chain).map_err(in_file("--cert"))?,
                    private_key(key).map_err(in_file("--key"))?,
                )
                .map_err(|error| in_file("--key")(unusable(&error, "--cert")))?,
        };
        Ok(Connector(Arc::new(config)))
    }

    /// Starts TLS with a host name or address; the first write performs the handshake.
    pub fn link(&self, host: &str, socket: DeadlineSocket) -> io::Result<Link> {
        let name = ServerName::try_from(host.to_string()).map_err(io::Error::other)?;
        let connection = ClientConnection::new(self.0.clone(), name).map_err(io::Error::other)?;
        Ok(Link(StreamOwned::new(connection, socket)))
    }
}

impl Read for Link {
    /// `StreamOwned` would first send the rest of the request. A server that has refused the
    /// request does not read it, and the response with the reason would be lost.
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

/// The server's side: why a handshake failed and what to do, unless it was the connection that
/// failed.
pub fn describe_handshake_error(error: &io::Error) -> Option<String> {
    use {AlertDescription as Alert, PeerIncompatible as Peer};
    Some(match error.get_ref()?.downcast_ref()? {
        Error::PeerIncompatible(
            Peer::SupportedVersionsExtensionRequired
            | Peer::SignatureAlgorithmsExtensionRequired
            | Peer::Tls12NotOffered
            | Peer::Tls12NotOfferedOrEnabled,
        ) => "the client supports only older versions of TLS; rfw accepts TLS 1.3, and TLS 1.2 if \
              outward.server.tls12 is set"
            .into(),
        Error::PeerIncompatible(
            reason @ (Peer::NoSignatureSchemesInCommon
            | Peer::NoCipherSuitesInCommon
            | Peer::NoKxGroupsInCommon),
        ) => format!(
            "the client and rfw have no algorithm in common ({reason:?}); update the client, or use a \
             key of another type"
        ),
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
        Error::InvalidCertificate(reason) => format!(
            "the client's certificate is refused ({reason}); make one with rfwgen --client NAME \
             and the CA of outward.server.clientca"
        ),
        Error::InvalidMessage(reason) => format!("the client does not speak TLS ({reason:?})"),
        other => format!("{other}"),
    })
}

/// The client's side: why TLS failed, as a sentence, unless it was the connection that failed.
pub fn describe_error(error: &io::Error) -> Option<String> {
    use AlertDescription as Alert;
    Some(match error.get_ref()?.downcast_ref()? {
        Error::InvalidCertificate(reason) => describe_certificate_error(reason),
        Error::AlertReceived(Alert::CertificateRequired) => {
            "the server requires a client certificate; pass one with --cert and --key".into()
        }
        Error::AlertReceived(
            alert @ (Alert::UnknownCA
            | Alert::DecryptError
            | Alert::BadCertificate
            | Alert::CertificateExpired
            | Alert::CertificateUnknown
            | Alert::UnsupportedCertificate),
        ) => format!("the server rejects the certificate of --cert ({alert:?})"),
        Error::InvalidMessage(_) => "the server does not speak TLS".into(),
        other => format!("no TLS 1.3 with this server: {other}"),
    })
}

fn describe_certificate_error(reason: &CertificateError) -> String {
    use CertificateError as Reason;
    let problem = match reason {
        Reason::Expired | Reason::ExpiredContext { .. } => {
            "has expired, or the local clock is wrong"
        }
        Reason::NotValidYet | Reason::NotValidYetContext { .. } => {
            "is not valid yet, or the local clock is wrong"
        }
        Reason::UnknownIssuer | Reason::BadSignature => {
            "is not from a trusted CA (see --cacert); it may be self-signed"
        }
        Reason::NotValidForNameContext { presented, .. } if presented.is_empty() => {
            "names no host: it has no subjectAltName"
        }
        Reason::NotValidForNameContext { expected, presented } => {
            let names = presented.join(", ");
            return format!(
                "the server's certificate is for {names}, not for {}",
                expected.to_str()
            );
        }
        Reason::InvalidPurpose | Reason::InvalidPurposeContext { .. } => {
            "is not for a server: its extendedKeyUsage lacks serverAuth"
        }
        Reason::Other(error) if error.to_string() == "CaUsedAsEndEntity" => {
            "is a CA certificate, perhaps self-signed, not a server's"
        }
        other => return format!("the server's certificate is invalid: {other}"),
    };
    format!("the server's certificate {problem}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::OtherError;

    #[test]
    fn empty_files() {
        let (part, problem) = Acceptor::new(b"", b"", None, false).unwrap_err();
        let none = "contains no CERTIFICATE block; name a certificate in PEM format";
        assert_eq!((part, &*problem), (Part::Chain, none));
        let connector = Connector::new(Some(b""), None).map(|_| ());
        assert_eq!(connector, Err(format!("--cacert: this file {none}")));
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

    /// tests/e2e/client.rs tests real certificates; these are the sentences that it does not reach.
    #[test]
    fn errors() {
        let certificate = |reason| Error::InvalidCertificate(reason);
        let names = |presented: &[&str]| {
            let presented = presented.iter().map(|name| name.to_string()).collect();
            let expected = ServerName::try_from("b").unwrap();
            certificate(CertificateError::NotValidForNameContext { expected, presented })
        };
        let other = |text: &'static str| {
            let error = OtherError(Arc::new(io::Error::other(text)));
            certificate(CertificateError::Other(error))
        };
        let table = [
            (certificate(CertificateError::Expired), "has expired"),
            (certificate(CertificateError::NotValidYet), "not valid yet"),
            (certificate(CertificateError::BadSignature), "not from a trusted CA"),
            (certificate(CertificateError::InvalidPurpose), "serverAuth"),
            (certificate(CertificateError::Revoked), "certificate is invalid: "),
            (names(&[]), "certificate names no host: it has no subjectAltName"),
            (names(&["a", "c"]), "certificate is for a, c, not for b"),
            (other("CaUsedAsEndEntity"), "is a CA certificate"),
            (other("MaximumPathDepthExceeded"), "certificate is invalid: "),
            (Error::AlertReceived(AlertDescription::CertificateRequired), "requires a client"),
            (Error::AlertReceived(AlertDescription::UnknownCA), "--cert (UnknownCA)"),
            (Error::AlertReceived(AlertDescription::InternalError), "no TLS 1.3 with"),
        ];
        for (error, part) in table {
            let description = describe_error(&io::Error::other(error)).unwrap();
            assert!(description.contains(part), "{description}");
        }
        for other in [io::Error::other("x"), ErrorKind::BrokenPipe.into()] {
            assert_eq!(describe_error(&other), None);
        }
    }
}
