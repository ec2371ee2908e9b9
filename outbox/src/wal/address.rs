use std::path::PathBuf;

/// Where the database is, from a `postgres://` URL.
#[derive(Debug, Clone)]
pub(crate) struct Address {
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) user: String,
    pub(super) password: Option<Password>,
    pub(super) database: String,
    pub(super) tls: Tls,
    pub(super) root_certificate: Option<PathBuf>,
}

#[derive(Clone)]
pub(super) struct Password(pub(super) String);

impl std::fmt::Debug for Password {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("***")
    }
}

/// `sslmode`, with libpq's meanings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tls {
    Disable,
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

/// Why a relay's source cannot be what the settings say. The URL itself is not repeated: it holds a password.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    #[error("the database URL does not parse: {0}")]
    Syntax(String),
    #[error("the slot name {0:?} is not of 1 to 63 characters from a-z, 0-9 and _")]
    SlotName(String),
    #[error("the database URL has no {0}")]
    Missing(&'static str),
    #[error("the database URL's sslmode {0:?} is none of disable, prefer, require, verify-ca, verify-full")]
    SslMode(String),
}

impl Address {
    pub(crate) fn parse(text: &str) -> Result<Self, AddressError> {
        let url = url::Url::parse(text).map_err(|error| AddressError::Syntax(error.to_string()))?;
        if !matches!(url.scheme(), "postgres" | "postgresql") {
            return Err(AddressError::Syntax("the scheme is not postgres".to_owned()));
        }
        let decoded = |part: &str| {
            percent_encoding::percent_decode_str(part)
                .decode_utf8()
                .map(std::borrow::Cow::into_owned)
                .map_err(|_| AddressError::Syntax("a percent-encoded part is not UTF-8".to_owned()))
        };
        let mut address = Self {
            host: url
                .host_str()
                .ok_or(AddressError::Missing("host"))?
                .trim_matches(['[', ']'])
                .to_owned(),
            port: url.port().unwrap_or(5432),
            user: decoded(url.username())?,
            password: url.password().map(decoded).transpose()?.map(Password),
            database: decoded(url.path().trim_start_matches('/'))?,
            tls: Tls::Prefer,
            root_certificate: None,
        };
        for (key, value) in url.query_pairs() {
            match key.as_ref() {
                "sslmode" | "ssl-mode" => {
                    address.tls = match value.as_ref() {
                        "disable" => Tls::Disable,
                        "allow" | "prefer" => Tls::Prefer,
                        "require" => Tls::Require,
                        "verify-ca" => Tls::VerifyCa,
                        "verify-full" => Tls::VerifyFull,
                        other => return Err(AddressError::SslMode(other.to_owned())),
                    };
                }
                "sslrootcert" | "ssl-root-cert" => address.root_certificate = Some(PathBuf::from(value.as_ref())),
                // The other parameters are the connection pool's, which reads the same URL.
                _ => {}
            }
        }
        if address.user.is_empty() {
            return Err(AddressError::Missing("user"));
        }
        if address.database.is_empty() {
            address.database.clone_from(&address.user);
        }
        Ok(address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_from_a_url_and_never_prints_its_password() {
        let address =
            Address::parse("postgres://re%40lay:p%2Fw@[::1]:6543/shop?sslmode=verify-full&sslrootcert=/ca.pem")
                .unwrap();
        assert_eq!((address.host.as_str(), address.port), ("::1", 6543));
        assert_eq!((address.user.as_str(), address.database.as_str()), ("re@lay", "shop"));
        assert_eq!(address.tls, Tls::VerifyFull);
        assert_eq!(address.password.as_ref().unwrap().0, "p/w");
        assert!(!format!("{address:?}").contains("p/w"));
    }

    #[test]
    fn a_wrong_address_says_what_is_wrong_with_it() {
        assert_eq!(
            Address::parse("postgres://host/db").unwrap_err(),
            AddressError::Missing("user")
        );
        assert!(matches!(Address::parse("mysql://u@h/db"), Err(AddressError::Syntax(_))));
        assert_eq!(
            Address::parse("postgres://u@h/db?sslmode=on").unwrap_err(),
            AddressError::SslMode("on".to_owned())
        );
    }
}
