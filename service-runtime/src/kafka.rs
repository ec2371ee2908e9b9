use clap::{Args, ValueEnum};
use rdkafka::ClientConfig;

use crate::settings::Secret;

#[derive(Debug, Clone, Args)]
pub struct KafkaSettings {
    /// Kafka brokers to ask first, `host:port,host:port`. An address that does not answer is retried for ever and shown
    /// by `/health/ready`.
    #[arg(long, env = "KAFKA_BROKERS", default_value = "127.0.0.1:9092")]
    pub kafka_brokers: String,
    /// How to talk to the brokers: `plaintext`, `ssl`, `sasl-plaintext` or `sasl-ssl`.
    #[arg(long, env = "KAFKA_SECURITY_PROTOCOL", default_value = "plaintext")]
    pub kafka_security_protocol: SecurityProtocol,
    /// SASL mechanism: `PLAIN`, `SCRAM-SHA-256` or `SCRAM-SHA-512`.
    #[arg(long, env = "KAFKA_SASL_MECHANISM", default_value = "SCRAM-SHA-512")]
    pub kafka_sasl_mechanism: String,
    /// SASL user name; needed with a sasl protocol.
    #[arg(long, env = "KAFKA_SASL_USERNAME")]
    pub kafka_sasl_username: Option<String>,
    /// SASL password; needed with a sasl protocol.
    #[arg(long, env = "KAFKA_SASL_PASSWORD", hide_env_values = true)]
    pub kafka_sasl_password: Option<Secret>,
    /// File with the certificate authorities to trust, PEM. Without it the system's are trusted.
    #[arg(long, env = "KAFKA_SSL_CA")]
    pub kafka_ssl_ca: Option<String>,
    /// File with the client certificate, PEM, for brokers that ask for one.
    #[arg(long, env = "KAFKA_SSL_CERTIFICATE")]
    pub kafka_ssl_certificate: Option<String>,
    /// File with the client certificate's key, PEM.
    #[arg(long, env = "KAFKA_SSL_KEY")]
    pub kafka_ssl_key: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SecurityProtocol {
    Plaintext,
    Ssl,
    SaslPlaintext,
    SaslSsl,
}

impl KafkaSettings {
    /// Address and security; the producer or consumer adds what makes it correct.
    pub fn client_config(&self, client_id: &str) -> ClientConfig {
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", &self.kafka_brokers)
            .set("client.id", client_id)
            .set("socket.keepalive.enable", "true")
            .set("reconnect.backoff.ms", "100")
            // The default of 10 s would be added to every broker restart.
            .set("reconnect.backoff.max.ms", "1000")
            .set(
                "security.protocol",
                match self.kafka_security_protocol {
                    SecurityProtocol::Plaintext => "plaintext",
                    SecurityProtocol::Ssl => "ssl",
                    SecurityProtocol::SaslPlaintext => "sasl_plaintext",
                    SecurityProtocol::SaslSsl => "sasl_ssl",
                },
            );
        let sasl = matches!(
            self.kafka_security_protocol,
            SecurityProtocol::SaslPlaintext | SecurityProtocol::SaslSsl
        );
        if sasl {
            config.set("sasl.mechanism", &self.kafka_sasl_mechanism);
            if let Some(username) = &self.kafka_sasl_username {
                config.set("sasl.username", username);
            }
            if let Some(password) = &self.kafka_sasl_password {
                config.set("sasl.password", password.expose());
            }
        }
        for (key, value) in [
            ("ssl.ca.location", &self.kafka_ssl_ca),
            ("ssl.certificate.location", &self.kafka_ssl_certificate),
            ("ssl.key.location", &self.kafka_ssl_key),
        ] {
            if let Some(value) = value {
                config.set(key, value);
            }
        }
        config
    }
}
