//! TLS: the only file that names rustls.

use super::timed::Timed;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection, StreamOwned, version};
use std::io;
use std::sync::Arc;

/// The server's side of one TLS connection.
pub type Session = StreamOwned<ServerConnection, Timed>;

/// What every connection of the outward server starts from.
#[derive(Clone, Debug)]
pub struct Acceptor(Arc<ServerConfig>);

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
        let key: PrivateKeyDer<'static> = rustls_pemfile::private_key(&mut &key[..])
            .map_err(|error| (Part::Key, format!("the key file is not PEM: {error}")))?
            .ok_or_else(|| (Part::Key, "the key file holds no unencrypted private key".into()))?;
        let versions: &[_] = match tls12 {
            true => &[&version::TLS13, &version::TLS12],
            false => &[&version::TLS13],
        };
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = match client_ca {
            None => WebPkiClientVerifier::no_client_auth(),
            Some(pem) => {
                let mut roots = RootCertStore::empty();
                let wrong = |why: String| (Part::ClientCa, why);
                for certificate in certificates(pem).map_err(wrong)? {
                    roots.add(certificate).map_err(|error| wrong(error.to_string()))?;
                }
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
            .map_err(|error| (Part::Key, format!("this pair cannot be used: {error}")))?;
        config.ignore_client_order = true;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Acceptor(Arc::new(config)))
    }

    /// Starts TLS on a connection; the handshake is made by the first read.
    pub fn session(&self, socket: Timed) -> io::Result<Session> {
        let connection = ServerConnection::new(self.0.clone()).map_err(io::Error::other)?;
        Ok(StreamOwned::new(connection, socket))
    }
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let certificates: Vec<_> = rustls_pemfile::certs(&mut &pem[..])
        .collect::<Result<_, _>>()
        .map_err(|error| format!("the certificate file is not PEM: {error}"))?;
    match certificates.is_empty() {
        true => Err("the certificate file holds no CERTIFICATE block".into()),
        false => Ok(certificates),
    }
}

/// Tells the peer that nothing more comes (RFC 8446, 6.1).
pub fn close(session: &mut Session) {
    session.conn.send_close_notify();
    let _ = session.conn.complete_io(&mut session.sock);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_hold_nothing() {
        let (part, why) = Acceptor::new(b"", b"", None, false).unwrap_err();
        assert_eq!((part, &*why), (Part::Chain, "the certificate file holds no CERTIFICATE block"));
    }
}
