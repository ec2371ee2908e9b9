use std::ffi::OsString;

use clap::{Args, Parser, Subcommand};
use service_runtime::settings::{Secret, parse_from};

#[derive(Debug, Parser)]
struct Cli {
    #[arg(long, env = "SETTINGS_TEST_CONFIG", global = true)]
    config: Option<std::path::PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(Run),
}

#[derive(Debug, Args)]
struct Run {
    /// Pieces, counted.
    #[arg(long, env = "SETTINGS_TEST_PIECES", default_value = "1")]
    pieces: u32,
    /// Delays.
    #[arg(long, env = "SETTINGS_TEST_DELAYS", default_value = "5s,30s", value_delimiter = ',')]
    delays: Vec<String>,
    /// Hidden.
    #[arg(long, env = "SETTINGS_TEST_URL", hide_env_values = true)]
    url: Option<Secret>,
}

fn parse(arguments: &[&str]) -> Result<(Run, String), String> {
    let arguments = ["program"].iter().chain(arguments).map(OsString::from);
    match parse_from::<Cli>(arguments) {
        Ok((
            Cli {
                command: Command::Run(run),
                ..
            },
            effective,
        )) => Ok((run, effective.to_text())),
        Err(error) => Err(error.to_string()),
    }
}

fn file(name: &str, text: &str) -> String {
    let path = std::env::temp_dir().join(format!("settings-{name}-{}.toml", std::process::id()));
    std::fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn a_flag_is_stronger_than_the_file_and_the_file_than_the_default() {
    let path = file(
        "order",
        "pieces = 7\ndelays = [\"1s\", \"2s\"]\nurl = \"postgres://u:hunter2@h/d\"\n",
    );
    let (run, text) = parse(&["run", "--config", &path]).unwrap();
    assert_eq!((run.pieces, run.delays), (7, vec!["1s".to_owned(), "2s".to_owned()]));
    assert!(text.contains("pieces = 7  (file)"), "{text}");
    assert!(
        text.contains("postgres://u:***@h/d  (file)") && !text.contains("hunter2"),
        "{text}"
    );

    let (run, text) = parse(&["run", "--pieces=9", &format!("--config={path}")]).unwrap();
    assert_eq!(run.pieces, 9);
    assert!(text.contains("pieces = 9  (flag)"), "{text}");

    let (run, text) = parse(&["run"]).unwrap();
    assert_eq!((run.pieces, run.delays), (1, vec!["5s".to_owned(), "30s".to_owned()]));
    assert!(run.url.is_none());
    assert!(
        text.contains("pieces = 1  (default)") && text.contains("(not set)"),
        "{text}"
    );
    std::fs::remove_file(path).unwrap();
}

#[test]
fn a_wrong_file_says_what_is_wrong_with_it() {
    for (name, text, expected) in [
        (
            "unknown",
            "pices = 7\n",
            "unknown setting `pices`, did you mean `pieces`?",
        ),
        ("value", "pieces = \"many\"\n", "invalid value 'many'"),
        ("syntax", "pieces = \n", "TOML parse error"),
        ("table", "[pieces]\n", "`pieces` is a table"),
    ] {
        let path = file(name, text);
        let error = parse(&["run", "--config", &path]).unwrap_err();
        assert!(error.contains(expected), "{name}: {error}");
        std::fs::remove_file(path).unwrap();
    }
    let error = parse(&["run", "--config", "/nonexistent.toml"]).unwrap_err();
    assert!(error.contains("cannot read /nonexistent.toml"), "{error}");
}
