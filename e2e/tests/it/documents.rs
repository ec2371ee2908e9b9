//! What the documents claim about the code, held against the code: settings, names of files, functions and tests, links.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, ensure};
use devstack::testing::binary;

/// With this variable set, the tables of `docs/SETTINGS.md` are written instead of compared.
const UPDATE: &str = "UPDATE_SETTINGS";
const SETTINGS: &str = "docs/SETTINGS.md";
/// Each program with what it must be given before it prints its settings; the reference does not show values.
const PROGRAMS: [(&str, &[&str]); 2] = [
    ("logistics-svc", &[]),
    (
        "commerce-consumer",
        &["--commerce-database-url=postgres://localhost/shop"],
    ),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> anyhow::Result<String> {
    fs::read_to_string(root().join(path)).with_context(|| path.to_owned())
}

#[test]
fn the_settings_reference_is_what_the_binaries_print() -> anyhow::Result<()> {
    let mut document = read(SETTINGS)?;
    for (program, needed) in PROGRAMS {
        let printed = Command::new(binary(program)?)
            .args(["config", "docs"])
            .args(needed)
            .env_clear()
            .output()?;
        ensure!(printed.status.success(), "{program} config docs: {printed:?}");
        let table = String::from_utf8(printed.stdout)?;
        let written = between_markers(&document, program)?;
        if std::env::var_os(UPDATE).is_some() {
            document = document.replace(&written, &table);
        } else {
            ensure!(
                written == table,
                "{SETTINGS} is not what `{program} config docs` prints; run this test with {UPDATE}=1"
            );
        }
    }
    if std::env::var_os(UPDATE).is_some() {
        fs::write(root().join(SETTINGS), document)?;
    }
    Ok(())
}

/// README repeats the settings that most people touch.
#[test]
fn the_settings_of_the_readme_have_the_defaults_of_the_reference() -> anyhow::Result<()> {
    let reference = read(SETTINGS)?;
    let table = between_markers(&read("README.md")?, "settings")?;
    let rows: Vec<Vec<&str>> = table.lines().skip(2).map(cells).collect();
    assert!(rows.len() > 5, "{rows:?}");
    for row in rows {
        let [variable, default, _] = row[..] else {
            anyhow::bail!("{row:?} is not variable, default, meaning");
        };
        let defaults: Vec<&str> = reference
            .lines()
            .map(cells)
            .filter(|cells| cells.get(1) == Some(&variable))
            .map(|cells| cells[2])
            .collect();
        assert!(defaults.contains(&default), "{variable}: {default:?}, not {defaults:?}");
    }
    Ok(())
}

/// `.env.example` has every variable of `docker-compose.yml`, with the value that holds without it.
#[test]
fn every_variable_of_the_compose_file_is_explained() -> anyhow::Result<()> {
    let compose = read("docker-compose.yml")?;
    let example = read(".env.example")?;
    let used: Vec<(&str, &str)> = compose
        .split("${")
        .skip(1)
        .filter_map(|rest| rest.split('}').next()?.split_once(":-"))
        .collect();
    assert!(used.len() > 10, "{used:?}");
    ensure!(used.len() == compose.matches("${").count(), "a variable has no default");
    for (variable, default) in &used {
        let line = format!("{variable}={default}");
        ensure!(
            example.lines().any(|found| found == line),
            "{line} is not in .env.example"
        );
    }
    // Compose's own.
    let known = |name: &str| name == "COMPOSE_PROFILES" || used.iter().any(|(variable, _)| *variable == name);
    for line in example.lines().filter(|line| !line.starts_with('#')) {
        if let Some((variable, _)) = line.split_once('=') {
            ensure!(known(variable), ".env.example: nobody uses {variable}");
        }
    }
    Ok(())
}

/// `path/file.rs` and `path/file.rs::name` in code spans: the file exists and has the function.
#[test]
fn every_file_function_and_test_that_a_document_names_exists() -> anyhow::Result<()> {
    let mut names = 0;
    for document in documents()? {
        let text = fs::read_to_string(&document)?;
        for span in code_spans(&text) {
            let (path, function) = match span.split_once("::") {
                Some((path, function)) => (path, Some(function)),
                None => (span, None),
            };
            if !path.contains('/') || !(path.ends_with(".rs") || path.ends_with(".sql")) {
                continue;
            }
            let code = read(path).with_context(|| format!("{} names {span}", document.display()))?;
            if let Some(function) = function {
                let found = code.contains(&format!("fn {function}(")) || code.contains(&format!("fn {function}<"));
                ensure!(found, "{} names {span}, which is not there", document.display());
                names += 1;
            }
        }
    }
    assert!(names > 50, "only {names} functions and tests are named");
    Ok(())
}

#[test]
fn every_promise_names_its_tests_or_says_that_it_is_not_built() -> anyhow::Result<()> {
    let text = read("docs/GUARANTEES.md")?;
    let sections: Vec<&str> = text.split("\n## ").skip(1).collect();
    for number in 1..=10 {
        let heading = format!("G{number} ");
        let section = sections.iter().find(|section| section.starts_with(&heading));
        let section = section.with_context(|| format!("no section {heading}"))?;
        let named = code_spans(section).any(|span| span.contains("tests/") && span.contains(".rs::"));
        assert!(named || section.contains("not built yet"), "{heading} names no test");
    }
    Ok(())
}

/// `docs/TRAPS.md`: a row is trap, defence, how it is taken out, test, what the test says then.
#[test]
fn every_trap_names_its_defence_and_its_test() -> anyhow::Result<()> {
    let text = read("docs/TRAPS.md")?;
    let rows: Vec<Vec<&str>> = text
        .lines()
        .filter(|line| line.starts_with('|'))
        .skip(2)
        .map(cells)
        .collect();
    assert!(rows.len() > 10, "only {} traps", rows.len());
    for row in rows {
        let [trap, defence, _, test, says] = row[..] else {
            anyhow::bail!("{row:?} is not trap, defence, how it is taken out, test, what it says");
        };
        let names = |cell| code_spans(cell).any(|span| span.contains(".rs::"));
        assert!(names(defence), "{trap}: no defence");
        assert!(names(test), "{trap}: no test");
        assert!(!says.is_empty(), "{trap}: what does the test say?");
    }
    Ok(())
}

#[test]
fn every_relative_link_resolves() -> anyhow::Result<()> {
    for document in documents()? {
        let text = fs::read_to_string(&document)?;
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if target.contains("://") {
                continue;
            }
            let (path, anchor) = target.split_once('#').unwrap_or((target, ""));
            let linked = match path {
                "" => document.clone(),
                path => document.parent().context("a document is in a folder")?.join(path),
            };
            ensure!(linked.exists(), "{} links to {target}", document.display());
            if !anchor.is_empty() {
                let headings = fs::read_to_string(&linked)?;
                let found = headings
                    .lines()
                    .any(|line| line.starts_with('#') && slug(line) == anchor);
                ensure!(found, "{} links to {target}, no such heading", document.display());
            }
        }
    }
    Ok(())
}

fn documents() -> anyhow::Result<Vec<PathBuf>> {
    let mut found = vec![root().join("README.md"), root().join("ARCHITECTURE.md")];
    let mut folders = vec![root().join("docs")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "md") {
                found.push(path);
            }
        }
    }
    Ok(found)
}

/// What stands between `<!-- name -->` and the next `<!-- end -->`, without the line ends beside the markers.
fn between_markers(text: &str, name: &str) -> anyhow::Result<String> {
    let start = format!("<!-- {name} -->\n");
    let (_, rest) = text
        .split_once(&start)
        .with_context(|| format!("no marker {start:?}"))?;
    let (part, _) = rest.split_once("<!-- end -->").context("no end marker")?;
    Ok(part.to_owned())
}

fn cells(row: &str) -> Vec<&str> {
    row.trim().trim_matches('|').split('|').map(str::trim).collect()
}

/// The text between single backticks, line by line; fenced blocks are left out.
fn code_spans(text: &str) -> impl Iterator<Item = &str> {
    let mut fenced = false;
    text.lines()
        .filter(move |line| {
            let fence = line.trim_start().starts_with("```");
            fenced ^= fence;
            !fenced && !fence
        })
        .flat_map(|line| line.split('`').skip(1).step_by(2))
}

/// A heading's anchor, as GitHub makes it.
fn slug(heading: &str) -> String {
    heading
        .trim_start_matches('#')
        .trim()
        .to_lowercase()
        .chars()
        .filter(|character| character.is_alphanumeric() || matches!(character, ' ' | '-' | '_'))
        .map(|character| if character == ' ' { '-' } else { character })
        .collect()
}
