//! The plan: the stages of a pipeline as a DAG with typed ports, each with the content hash of all it depends on.

mod stage;

use std::collections::HashMap;

use petgraph::Direction;
use petgraph::algo::tarjan_scc;
use petgraph::graph::{DiGraph, NodeIndex};
use petgraph::visit::EdgeRef;

pub use stage::{Context, Load, Need, Port, Stage, StageId};

use crate::draw::{Arrow, Drawing, NodeState, Shape};
use crate::error::RunError;
use crate::hash::StageHash;
use crate::settings::Settings;

/// A stage in its place.
#[derive(Debug)]
pub struct Planned {
    /// The stage.
    pub stage: Box<dyn Stage>,
    /// Its name.
    pub id: StageId,
    /// Its content hash.
    pub hash: StageHash,
}

/// The stages of a pipeline, linked.
#[derive(Debug)]
pub struct Plan {
    graph: DiGraph<Planned, Port>,
    order: Vec<NodeIndex>,
}

/// Stages that wait for each other in a circle, each for the next and the last for the first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cycle {
    /// The stages with their paths in the pipeline file.
    pub chain: Vec<(StageId, String)>,
}

/// Why stages can't be linked to a plan.
#[derive(Debug)]
pub enum LinkError {
    /// Circles among the stages.
    Cycles(Vec<Cycle>),
    /// Anything else.
    Other(RunError),
}

impl From<RunError> for LinkError {
    fn from(error: RunError) -> Self {
        Self::Other(error)
    }
}

impl Plan {
    /// Links stages by their ports, orders them and computes their hashes.
    ///
    /// # Errors
    /// Circles; a port without a stage or of another type, two stages of one name (mistakes of this program); a file
    /// that went away.
    pub fn link(stages: Vec<Box<dyn Stage>>, settings: &Settings) -> Result<Self, LinkError> {
        let mut links: DiGraph<Box<dyn Stage>, Port> = DiGraph::new();
        let mut by_id = HashMap::new();
        for stage in stages {
            let id = stage.id();
            let node = links.add_node(stage);
            if by_id.insert(id.clone(), node).is_some() {
                return Err(RunError::Plan(format!("two stages `{id}`")).into());
            }
        }
        for node in links.node_indices() {
            for need in links[node].needs() {
                let id = links[node].id();
                let Some(&from) = by_id.get(&need.stage) else {
                    return Err(RunError::Plan(format!("`{id}` needs `{}`, which no stage is", need.stage)).into());
                };
                if links[from].gives() != need.port {
                    let given = links[from].gives().id();
                    let message =
                        format!("`{id}` needs a {} of `{}`, which gives a {given}", need.port.id(), need.stage);
                    return Err(RunError::Plan(message).into());
                }
                links.add_edge(from, node, need.port);
            }
        }
        let components = tarjan_scc(&links);
        let cycles: Vec<Cycle> = components.iter().filter_map(|component| cycle(&links, component)).collect();
        if !cycles.is_empty() {
            return Err(LinkError::Cycles(cycles));
        }
        // Tarjan's components come in reverse topological order.
        let order: Vec<NodeIndex> = stable_order(&links);
        let mut hashes: HashMap<NodeIndex, StageHash> = HashMap::new();
        for &node in &order {
            hashes.insert(node, hash(&links, node, &hashes, settings)?);
        }
        let graph =
            links.map_owned(|node, stage| Planned { id: stage.id(), hash: hashes[&node], stage }, |_, port| port);
        Ok(Self { graph, order })
    }

    /// The stages, each after all that it needs.
    pub fn stages(&self) -> impl Iterator<Item = &Planned> {
        self.order.iter().map(|&node| &self.graph[node])
    }

    /// Number of stages.
    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// Whether there is no stage.
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    /// The stage of this name.
    pub fn get(&self, id: &StageId) -> Option<&Planned> {
        self.stages().find(|planned| planned.id == *id)
    }

    /// Positions, in [`stages`](Self::stages)' order, of the stages that stage `index` needs.
    pub fn needs(&self, index: usize) -> Vec<usize> {
        let mut needs: Vec<usize> = self
            .graph
            .neighbors_directed(self.order[index], Direction::Incoming)
            .filter_map(|from| self.order.iter().position(|&node| node == from))
            .collect();
        needs.sort_unstable();
        needs.dedup();
        needs
    }

    /// The DAG as a picture. `state` says how to mark each stage, `lines` what to write below its name.
    pub fn drawing(
        &self,
        title: &str,
        state: &dyn Fn(&Planned) -> NodeState,
        lines: &dyn Fn(&Planned) -> Vec<String>,
    ) -> Drawing {
        let position = |node: NodeIndex| self.order.iter().position(|&n| n == node).unwrap_or(0);
        let mut arrows: Vec<Arrow> = self
            .graph
            .edge_references()
            .map(|edge| Arrow {
                from: position(edge.source()),
                to: position(edge.target()),
                label: edge.weight().id().to_owned(),
            })
            .collect();
        arrows.sort_by_key(|arrow| (arrow.from, arrow.to));
        arrows.dedup_by_key(|arrow| (arrow.from, arrow.to));
        let nodes = self
            .stages()
            .map(|planned| Shape {
                title: planned.id.kind.replace('_', " "),
                lines: std::iter::once(planned.id.subject.clone())
                    .filter(|subject| !subject.is_empty())
                    .chain(lines(planned))
                    .collect(),
                state: state(planned),
                color: color(planned.stage.gives()),
            })
            .collect();
        Drawing { title: title.to_owned(), nodes, arrows }
    }
}

fn color(port: Port) -> usize {
    match port {
        Port::Dataset => 2,
        Port::Teacher => 1,
        Port::Student => 0,
        Port::Scores => 3,
        Port::Files => 4,
        Port::Report => 5,
    }
}

/// A topological order that keeps the order of declaration where the ports leave a choice.
fn stable_order(links: &DiGraph<Box<dyn Stage>, Port>) -> Vec<NodeIndex> {
    let mut waiting: Vec<NodeIndex> = links.node_indices().collect();
    let mut order: Vec<NodeIndex> = Vec::with_capacity(waiting.len());
    while let Some(at) = waiting
        .iter()
        .position(|&node| links.neighbors_directed(node, Direction::Incoming).all(|from| order.contains(&from)))
    {
        order.push(waiting.remove(at));
    }
    order
}

/// A circle within a strongly connected component, where it holds one.
fn cycle(links: &DiGraph<Box<dyn Stage>, Port>, component: &[NodeIndex]) -> Option<Cycle> {
    let start = *component.iter().min()?;
    let next = |node: NodeIndex| {
        // What a stage waits for is its input: the chain runs against the edges.
        links.neighbors_directed(node, Direction::Incoming).filter(|from| component.contains(from)).min()
    };
    next(start)?;
    let mut walk = vec![start];
    loop {
        let to = next(*walk.last()?)?;
        if let Some(at) = walk.iter().position(|&node| node == to) {
            let named = |&node: &NodeIndex| (links[node].id(), links[node].path());
            return Some(Cycle { chain: walk[at..].iter().map(named).collect() });
        }
        walk.push(to);
    }
}

fn hash(
    links: &DiGraph<Box<dyn Stage>, Port>,
    node: NodeIndex,
    hashes: &HashMap<NodeIndex, StageHash>,
    settings: &Settings,
) -> Result<StageHash, RunError> {
    let stage = &links[node];
    let own = stage.settings()?;
    let mut inputs: Vec<(StageId, Port, StageHash)> = links
        .edges_directed(node, Direction::Incoming)
        .map(|edge| (links[edge.source()].id(), *edge.weight(), hashes[&edge.source()]))
        .collect();
    inputs.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(StageHash::of(|h| {
        h.text(stage.id().kind);
        h.text(stage.code());
        h.json(&own);
        if stage.load() == Load::Heavy {
            // Sums are split over the threads, so the last bits depend on their number.
            h.text(&settings.threads.to_string());
            h.text(settings.kernels_id());
        }
        for (id, port, hash) in &inputs {
            h.text(id.kind);
            h.text(port.id());
            h.hash(hash);
        }
    }))
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// A stage that writes its settings and what it read.
    #[derive(Debug)]
    pub(crate) struct Fake {
        pub kind: &'static str,
        pub needs: Vec<&'static str>,
        pub setting: u64,
    }

    impl Stage for Fake {
        fn id(&self) -> StageId {
            StageId::new(self.kind, "")
        }
        fn path(&self) -> String {
            format!("at.{}", self.kind)
        }
        fn gives(&self) -> Port {
            Port::Dataset
        }
        fn needs(&self) -> Vec<Need> {
            self.needs.iter().map(|kind| Need { stage: StageId::new(kind, ""), port: Port::Dataset }).collect()
        }
        fn settings(&self) -> Result<Value, RunError> {
            Ok(json!(self.setting))
        }
        fn is_goal(&self) -> bool {
            self.kind != "a"
        }
        fn run(&self, context: &Context<'_>) -> Result<String, RunError> {
            if self.setting == 666 {
                return Err(RunError::Report("fails as asked".into()));
            }
            crate::store::write_json(&context.dir.join("out.json"), &self.setting)?;
            Ok(String::new())
        }
    }

    pub(crate) fn stages(list: &[(&'static str, &[&'static str], u64)]) -> Vec<Box<dyn Stage>> {
        let boxed = |&(kind, needs, setting): &(&'static str, &[&'static str], u64)| {
            Box::new(Fake { kind, needs: needs.to_vec(), setting }) as Box<dyn Stage>
        };
        list.iter().map(boxed).collect()
    }

    fn hashes(list: &[(&'static str, &[&'static str], u64)]) -> HashMap<&'static str, StageHash> {
        match Plan::link(stages(list), &Settings::default()) {
            Ok(plan) => plan.stages().map(|p| (p.id.kind, p.hash)).collect(),
            Err(error) => panic!("{error:?}"),
        }
    }

    #[test]
    fn a_change_reaches_what_depends_on_it_and_no_more() {
        let before = hashes(&[("a", &[], 1), ("b", &["a"], 1), ("c", &["a"], 1), ("d", &["b", "c"], 1)]);
        let after = hashes(&[("d", &["c", "b"], 1), ("a", &[], 1), ("b", &["a"], 2), ("c", &["a"], 1)]);
        let changed: Vec<&str> = ["a", "b", "c", "d"].into_iter().filter(|k| before[k] != after[k]).collect();
        assert_eq!(changed, ["b", "d"]);
    }

    #[test]
    fn a_circle_is_named_stage_by_stage() {
        let result = Plan::link(
            stages(&[("a", &["c"], 0), ("b", &["a"], 0), ("c", &["b"], 0), ("d", &[], 0)]),
            &Settings::default(),
        );
        let Err(LinkError::Cycles(cycles)) = result else { panic!("no circle found") };
        let chain: Vec<&str> = cycles[0].chain.iter().map(|(id, _)| id.kind).collect();
        assert_eq!(cycles.len(), 1);
        assert_eq!(chain, ["a", "c", "b"]);
    }

    #[test]
    fn a_port_without_a_stage_is_refused() {
        assert!(matches!(Plan::link(stages(&[("a", &["x"], 0)]), &Settings::default()), Err(LinkError::Other(_))));
    }
}
