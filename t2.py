import sys; sys.path.insert(0,'/work/main'); sys.path.insert(0,'/work/main/tests')
import torch, time
from test_pointwise import *
print(len(FUNCTIONS))
from torch._inductor import lowering
# which lower / fall back?
import torch._inductor.config as ic
bad=[]
def trial(names, dt, ol=True):
    fs=[FUNCTIONS[n] for n in names]
    torch._dynamo.reset()
    def f(x): return tuple(g(x) for g in fs)
    inner = inductor.compile_inner if ol else compile_fx_inner
    def be(gm,ex,**k): return inductor.compile_graph(gm,ex,stamp='x%s'%ol,inner=inner)
    return torch.compile(f,backend=be,dynamic=True)
torch.set_num_threads(1)
t=time.time()
with ic.patch(fx_graph_cache=False):
    g=trial(list(FUNCTIONS),torch.float32)
    y=g(torch.randn(4097)); print('all compile',time.time()-t)
